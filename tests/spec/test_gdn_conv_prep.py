"""`interleaved` of `gdn_conv_prep`: what it binds, costs and refuses."""

import re
from typing import Any

import numpy as np
import pytest

from polyfuse.spec import OPS, Call, SpecError, bind

NAME = "gdn_conv_prep"
SPEC = OPS[NAME]
DEFAULTS: dict[str, Any] = {a.name: a.default for a in SPEC.attrs} | {t.name: None for t in SPEC.tensors if t.optional}
HEADS = {"num_k_heads": 2, "head_k_dim": 3, "head_v_dim": 5}
COLUMNS = "2*num_k_heads*head_k_dim + (1 + interleaved)*HV*head_v_dim"


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def call(columns: int = 72, heads_v: int = 6, interleaved: bool = True, **changes: Any) -> Call:
    """Seven rows of two heads of q and of k, and some of v."""
    arrays = {"x": zeros(7, columns), "weight": zeros(12 + 5 * heads_v, 4)}
    arrays |= dict.fromkeys(("a", "b"), zeros(7, heads_v)) | dict.fromkeys(("A_log", "dt_bias"), zeros(heads_v))
    return bind(SPEC, DEFAULTS | HEADS | arrays | {"interleaved": interleaved} | changes)


def test_results_and_cost_are_those_of_the_columns_in_order() -> None:
    """The columns of z are not read."""
    plain, interleaved = call(columns=42, interleaved=False), call()
    assert interleaved.outputs == plain.outputs
    assert SPEC.cost(interleaved) == SPEC.cost(plain)


def test_channels_do_not_include_z() -> None:
    given = {"bias": zeros(42), "initial_state": zeros(1, 42, 3), "output_final_state": True}
    assert call(**given).outputs[5].shape == (1, 42, 3)
    with pytest.raises(SpecError, match=r"weight: expected 2\*num_k_heads\*head_k_dim \+ HV\*head_v_dim=42 in "):
        call(weight=zeros(72, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": 42}, f"x: expected {COLUMNS}=72 in [L, {COLUMNS}], got [7, 42]"),
        ({"columns": 72, "interleaved": False}, f"x: expected {COLUMNS}=42 in [L, {COLUMNS}], got [7, 72]"),
        (
            {"columns": 62, "heads_v": 5},
            "A_log: expected HV divisible by num_k_heads=2 with interleaved=True, got 5",
        ),
        ({"interleaved": 1}, "interleaved: expected True or False, got 1"),
        ({"a": zeros(7, 3, 2)}, "a: expected num_k_heads=2 in [L, num_k_heads, HV/num_k_heads], got [7, 3, 2]"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(f"{NAME}: {message}")):
        call(**changes)
