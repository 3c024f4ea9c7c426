"""What `silu_mul_block_quant` refuses, and in which words."""

import math
import re
from typing import Any

import numpy as np
import pytest

from polyfuse.spec import OPS, SpecError, bind
from polyfuse.spec.block_quant import LEAST_DIVISOR, scale_floor

NAME = "silu_mul_block_quant"
SPEC = OPS[NAME]
DEFAULTS: dict[str, Any] = {a.name: a.default for a in SPEC.attrs} | dict.fromkeys(
    t.name for t in SPEC.tensors if t.optional
)


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def call(**changes: Any) -> Any:
    return bind(SPEC, DEFAULTS | {"x": zeros(2, 512)} | changes)


def attrs_of(**changes: Any) -> Any:
    return call(**changes).attrs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros(512, np.float32)}, "x: expected at least 2 dimensions, got 1"),
        (
            {"num_rows": np.zeros(2, np.int32)},
            "x: expected shape [E, T, 2*D] with num_rows, got [2, 512]",
        ),
        ({"x": zeros(2, 513)}, "x: expected a size divisible by 2 in [..., 2*D], got 513"),
        ({"up": zeros(2, 256)}, "up: expected D=512 in [..., D], got [2, 256]"),
        ({"up": zeros(3, 512)}, "up: expected leading dimensions [2] in [..., D], got [3, 512]"),
        ({"up": zeros(1, 2, 512)}, "up: expected leading dimensions [2] in [..., D], got [1, 2, 512]"),
        ({"up": np.float32(0)}, "up: expected shape [..., D], got []"),
        ({"up": np.zeros((2, 512), np.float16)}, "up: expected dtype float32 as the other T arguments, got float16"),
        ({"up": np.zeros((2, 512))}, "up: expected dtype float32 or bfloat16 or float16, got float64"),
        ({"x": zeros(512), "up": zeros(512)}, "x: expected at least 2 dimensions, got 1"),
        (
            {"up": zeros(2, 512), "num_rows": np.zeros(2, np.int32)},
            "x: expected shape [E, T, D] with num_rows, got [2, 512]",
        ),
        (
            {"x": zeros(2, 3, 128), "up": zeros(2, 3, 128), "num_rows": np.zeros(3, np.int32)},
            "num_rows: expected E=2 in [E], got [3]",
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
        ({"interleaved": True, "up": zeros(2, 512)}, "interleaved: expected False with up, got True"),
        ({"limit_on": "silu"}, "limit: expected a number > 0 with limit_on=silu, got None"),
        ({"limit_on": "silu", "limit": 7, "alpha": 1.7}, "alpha: expected 1 with limit_on=silu, got 1.7"),
        ({"up_offset": math.inf}, "up_offset: expected a finite number, got inf"),
        ({"row_weight": zeros(3)}, "row_weight: expected leading dimensions [2] in [...], got [3]"),
        (
            {"expert_ends": np.zeros(2, np.int32), "x": zeros(2, 3, 512)},
            "x: expected shape [T, 2*D] with expert_ends, got 3 dimensions",
        ),
        (
            {"expert_ends": np.zeros(2, np.int32), "num_rows": np.zeros(2, np.int32), "x": zeros(2, 3, 512)},
            "expert_ends: expected None with num_rows, got both",
        ),
        ({"expert_alignment": 4}, "expert_alignment: expected 1 without expert_ends, got 4"),
        ({"scale_format": "e4m3"}, "quant_dtype: expected float4_e2m1 with scale_format=e4m3, got float8_e4m3fn"),
        (
            {"quant_dtype": "float4_e2m1", "x": zeros(2, 42)},
            "x: expected an even D with quant_dtype=float4_e2m1, got 21",
        ),
        (
            {"quant_dtype": "float4_e2m1", "group_size": 7},
            "group_size: expected an even number with quant_dtype=float4_e2m1, got 7",
        ),
        (
            {"quant_dtype": "float4_e2m1", "scale_format": "e4m3", "scale_min": 1},
            "scale_min: expected None with scale_format=e4m3, got 1.0",
        ),
        ({"global_scale": np.float32(1)}, "scale_format: expected e4m3 with global_scale, got float32"),
        (
            {"scale_layout": "swizzled_128x4"},
            "scale_format: expected ue8m0 or e4m3 with scale_layout=swizzled_128x4, got float32",
        ),
        (
            {"scale_format": "ue8m0", "fill": 3},
            "fill: expected a power of two from 2**-126 to 2**127 with scale_format=ue8m0, got 3.0",
        ),
        ({"fill": math.nan}, "fill: expected a finite number, got nan"),
    ],
)
def test_bad_calls(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=f"^{re.escape(f'{NAME}: {message}')}$"):
        attrs_of(**changes)


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0_packed"])
def test_with_up_x_is_the_gate(scale_format: str) -> None:
    joined = call(x=zeros(2, 3, 512), num_rows=np.zeros(2, np.int32), scale_format=scale_format)
    apart = call(x=zeros(2, 3, 256), up=zeros(2, 3, 256), num_rows=np.zeros(2, np.int32), scale_format=scale_format)
    assert apart.dims == joined.dims
    assert apart.dims["D"] == 256
    assert apart.outputs == joined.outputs
    assert SPEC.cost(apart) == SPEC.cost(joined)


def test_with_up_the_columns_of_x_may_be_odd() -> None:
    assert call(x=zeros(2, 21), up=zeros(2, 21), group_size=7).dims["G"] == 3


@pytest.mark.parametrize("scale_min", [None, 0, 2.0**-126, 1e-12, 2.0**127])
def test_least_scales(scale_min: float | None) -> None:
    assert attrs_of(scale_min=scale_min)["scale_min"] == scale_min


def test_scale_floor() -> None:
    assert scale_floor("int8", None, "float32") == 2**-23
    assert scale_floor("float8_e4m3fn", None, "float32") == 1 / (448 * 512)
    assert scale_floor("float8_e4m3fn", None, "ue8m0") == scale_floor("int8", None, "ue8m0_packed") == 2**-126
    assert [scale_floor("int8", 0.0, "float32"), scale_floor("float8_e5m2", 0.5, "ue8m0")] == [0.0, 0.5]
    assert LEAST_DIVISOR == 1e-12
