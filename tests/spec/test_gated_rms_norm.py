"""What `gated_rms_norm` binds, and what it refuses in which words."""

import math
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from polyfuse.spec import OPS, Call, SpecError, bind

NAME = "gated_rms_norm"
SPEC = OPS[NAME]
DEFAULTS: dict[str, Any] = {a.name: a.default for a in SPEC.attrs}


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


def call(**changes: Any) -> Call:
    """Seven rows of three heads of two."""
    return bind(SPEC, DEFAULTS | {"x": zeros(7, 3, 2), "gate": zeros(7, 3, 2), "weight": zeros(2)} | changes)


@pytest.mark.parametrize("lead", [(), (0,), (5,), (7, 3), (2, 7, 3, 2)])
def test_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    bound = call(x=zeros(*lead, 2), gate=zeros(*lead, 2))
    assert dict(bound.dims) == {"...": lead, "V": 2}
    assert [output.shape for output in bound.outputs] == [(*lead, 2)]


def test_each_array_has_its_own_dtype_and_the_result_that_of_x() -> None:
    bound = call(x=zeros(7, 3, 2, dtype=ml_dtypes.bfloat16), weight=zeros(2, dtype=np.float16))
    assert (bound.dtypes["T"], bound.dtypes["gate"], bound.dtypes["weight"]) == ("bfloat16", "float32", "float16")
    assert bound.outputs[0].dtype == "bfloat16"
    # x and y of two bytes, the gate of four, and the weight once.
    assert SPEC.cost(bound).bytes_read == 7 * 3 * 2 * (2 + 4) + 2 * 2
    assert SPEC.cost(bound).bytes_written == 7 * 3 * 2 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 0.0}, "eps: expected a finite number > 0 (a zero row must give zeros), got 0.0"),
        ({"eps": -1e-6}, "eps: expected a finite number > 0 (a zero row must give zeros), got -1e-06"),
        ({"eps": math.nan}, "eps: expected a finite number > 0 (a zero row must give zeros), got nan"),
        ({"eps": math.inf}, "eps: expected a finite number > 0 (a zero row must give zeros), got inf"),
        ({"weight_offset": math.nan}, "weight_offset: expected a finite number, got nan"),
        ({"weight_offset": -math.inf}, "weight_offset: expected a finite number, got -inf"),
        ({"weight_offset": None}, "weight_offset: expected a value (default 0.0), got None"),
        ({"activation": "swish"}, "activation: expected one of silu, sigmoid, got 'swish'"),
        ({"activation": None}, "activation: expected a value (default 'silu'), got None"),
        ({"gate": zeros(7, 6)}, "gate: expected leading dimensions [7, 3] in [..., V], got [7, 6]"),
        ({"gate": zeros(7, 3, 4)}, "gate: expected V=2 in [..., V], got [7, 3, 4]"),
        ({"weight": zeros(3)}, "weight: expected V=2 in [V], got [3]"),
        ({"weight": zeros(3, 2)}, "weight: expected shape [V], got [3, 2]"),
        ({"gate": None}, "gate: expected an array, got None"),
        ({"x": zeros(7, 3, 2, dtype=np.float64)}, "x: expected dtype float32 or bfloat16 or float16, got float64"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(f"{NAME}: {message}")):
        call(**changes)


def test_the_bounds_count_roundings() -> None:
    # 64 columns: sqrt(64) / 2 for the sum, and 10.
    assert SPEC.bound("y").error({"V": 64}) == (14 * 2.0**-24, 2.0**-126)
    assert SPEC.bound("act").error({"V": 64}) == (8 * 2.0**-24, 2.0**-126)
