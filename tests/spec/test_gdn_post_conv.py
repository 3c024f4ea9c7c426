"""The two shapes of a and b in `gdn_post_conv`, and what is refused in which words."""

import re
from typing import Any

import numpy as np
import pytest

from polyfuse.spec import OPS, Call, SpecError, bind

NAME = "gdn_post_conv"
SPEC = OPS[NAME]
DEFAULTS: dict[str, Any] = {a.name: a.default for a in SPEC.attrs}
HEADS = {"num_k_heads": 2, "head_k_dim": 3, "head_v_dim": 5}
EITHER = "[L, HV] or [L, num_k_heads, HV/num_k_heads]"


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def call(**changes: Any) -> Call:
    """Seven rows of two heads of q and of k, and six of v."""
    arrays = {"conv_out": zeros(7, 42), "a": zeros(7, 6), "b": zeros(7, 6), "A_log": zeros(6), "dt_bias": zeros(6)}
    return bind(SPEC, DEFAULTS | HEADS | arrays | changes)


@pytest.mark.parametrize("split", [{}, {"a"}, {"b"}, {"a", "b"}])
def test_either_shape_binds_the_same(split: set[str]) -> None:
    bound = call(**dict.fromkeys(split, zeros(7, 2, 3)))
    assert dict(bound.dims) == {"L": 7, "HV": 6}
    assert bound.outputs == call().outputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": zeros(7, 3, 2)}, "a: expected num_k_heads=2 in [L, num_k_heads, HV/num_k_heads], got [7, 3, 2]"),
        ({"b": zeros(7, 6, 1)}, "b: expected num_k_heads=2 in [L, num_k_heads, HV/num_k_heads], got [7, 6, 1]"),
        ({"b": zeros(7, 2, 2)}, f"b: expected HV=6 in {EITHER}, got [7, 2, 2]"),
        ({"b": zeros(8, 2, 3)}, f"b: expected L=7 in {EITHER}, got [8, 2, 3]"),
        ({"a": zeros(7)}, f"a: expected shape {EITHER}, got [7]"),
        ({"a": zeros(7, 2, 3, 1)}, f"a: expected shape {EITHER}, got [7, 2, 3, 1]"),
        ({"a": zeros(7, 2, 2), "b": zeros(7, 2, 2)}, "A_log: expected HV=4 in [HV], got [6]"),
    ],
)
def test_another_grouping_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(f"{NAME}: {message}")):
        call(**changes)


def test_value_heads_that_no_key_head_has_a_share_of() -> None:
    odd = {"conv_out": zeros(7, 37), "A_log": zeros(5), "dt_bias": zeros(5), "b": zeros(7, 5)}
    assert call(**odd, a=zeros(7, 5)).dims["HV"] == 5
    with pytest.raises(SpecError, match=re.escape(f"{NAME}: b: expected HV=4 in {EITHER}, got [7, 5]")):
        call(**odd, a=zeros(7, 2, 2))
