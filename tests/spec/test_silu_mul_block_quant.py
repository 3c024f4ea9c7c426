"""What `silu_mul_block_quant` refuses, and in which words."""

import math
import re
from typing import Any

import numpy as np
import pytest

from polyfuse.spec import OPS, SpecError, bind
from polyfuse.spec.silu_mul_block_quant import LEAST_DIVISOR, scale_floor

NAME = "silu_mul_block_quant"
SPEC = OPS[NAME]
DEFAULTS: dict[str, Any] = {a.name: a.default for a in SPEC.attrs} | {"num_rows": None}


def attrs_of(**changes: Any) -> Any:
    return bind(SPEC, DEFAULTS | {"x": np.zeros((2, 512), np.float32)} | changes).attrs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((2, 100), np.float32)}, "x: expected a last dimension divisible by 2*group_size=256, got 100"),
        ({"x": np.zeros(512, np.float32)}, "x: expected at least 2 dimensions, got 1"),
        (
            {"num_rows": np.zeros(2, np.int32)},
            "x: expected shape [E, T, 2*D] with num_rows, got [2, 512]",
        ),
        ({"scale_ub": 0}, "scale_ub: expected a number > 0, got 0.0"),
        ({"limit": math.nan}, "limit: expected a number > 0, got nan"),
        ({"scale_min": -1}, "scale_min: expected 0 or a number from 2**-126 to 2**127, got -1.0"),
        ({"scale_min": 1e-38}, "scale_min: expected 0 or a number from 2**-126 to 2**127, got 1e-38"),
        ({"scale_min": math.inf}, "scale_min: expected 0 or a number from 2**-126 to 2**127, got inf"),
        ({"scale_min": math.nan}, "scale_min: expected 0 or a number from 2**-126 to 2**127, got nan"),
        ({"reciprocal": 1 / 448}, "reciprocal: expected True or False, got 0.002232142857142857"),
        ({"scale_min": "0"}, "scale_min: expected a number, got '0'"),
        (
            {"scale_min": 0, "scale_format": "ue8m0"},
            "scale_min: expected a number > 0 with scale_format=ue8m0, got 0.0",
        ),
    ],
)
def test_bad_calls(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=f"^{re.escape(f'{NAME}: {message}')}$"):
        attrs_of(**changes)


@pytest.mark.parametrize("scale_min", [None, 0, 2.0**-126, 1e-12, 2.0**127])
def test_least_scales(scale_min: float | None) -> None:
    assert attrs_of(scale_min=scale_min)["scale_min"] == scale_min


def test_scale_floor() -> None:
    assert [scale_floor("int8"), scale_floor("float8_e4m3fn")] == [2**-23, 1 / (448 * 512)]
    assert [scale_floor("int8", 0.0), scale_floor("float8_e5m2", 0.5)] == [0.0, 0.5]
    assert LEAST_DIVISOR == 1e-12
