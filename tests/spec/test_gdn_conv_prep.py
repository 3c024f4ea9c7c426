"""`interleaved`, pools of states and `activation` of `gdn_conv_prep`: what they bind, cost and refuse."""

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


def pool(columns: int = 3, slots: int = 5, **changes: Any) -> Call:
    return call(state_pool=zeros(slots, 42, columns), **changes)


def test_a_pool_is_updated_in_place_of_a_final_state() -> None:
    bound = pool(columns=7)
    assert [(output.name, output.shape) for output in bound.updated] == [("state_pool", (5, 42, 7))]
    assert bound.outputs[5].shape == (0, 42, 3)
    # Of a sequence the last 3 columns are read, and all 7 are written.
    assert SPEC.cost(bound).bytes_read - SPEC.cost(call()).bytes_read == 42 * 3 * 4
    assert SPEC.cost(bound).bytes_written - SPEC.cost(call()).bytes_written == 42 * 7 * 4


def test_a_final_state_has_the_dtype_of_the_initial_one() -> None:
    state = np.zeros((1, 42, 3), np.float16)
    assert call(initial_state=state, output_final_state=True).outputs[5].dtype == "float16"
    assert call(output_final_state=True).outputs[5].dtype == "float32"


def test_activation_may_be_none() -> None:
    assert call(activation=None).attrs["activation"] is None
    assert call().attrs["activation"] == "silu"
    with pytest.raises(SpecError, match="activation: expected one of silu, got 'gelu'"):
        call(activation="gelu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial_state": zeros(1, 42, 3)}, "initial_state: expected None beside a state_pool, got an array; try"),
        ({"output_final_state": True}, "output_final_state: expected False beside a state_pool, which is updated"),
        ({"columns": 2}, "state_pool: expected n >= W - 1=3 in [slots, 2*num_k_heads*head_k_dim + "),
        ({"cu_seqlens": np.zeros(7, np.int32)}, "state_pool: expected slots >= 6 in [slots, "),
        ({"slots": 0, "state_indices": np.zeros(1, np.int32)}, "state_pool: expected slots >= 1 in [slots, "),
        ({"state_indices": np.zeros(2, np.int32)}, "state_indices: expected S=1 in [S], got [2]"),
        ({"has_initial_state": np.zeros(1, np.int32)}, "has_initial_state: expected dtype bool, got int32"),
    ],
)
def test_what_does_not_fit_a_pool_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(f"{NAME}: {message}")):
        pool(**changes)


@pytest.mark.parametrize("name", ["state_indices", "has_initial_state"])
def test_what_needs_a_pool_is_refused_without_one(name: str) -> None:
    with pytest.raises(SpecError, match=f"{name}: expected None without a state_pool, got an array"):
        call(**{name: np.zeros(1, np.int32 if name == "state_indices" else bool)})


def test_six_sequences_fit_a_pool_of_five_slots_that_are_named() -> None:
    """-1 names none."""
    indices = np.array([0, 1, 2, 3, 4, -1], np.int32)
    assert pool(cu_seqlens=np.zeros(7, np.int32), state_indices=indices).dims["S"] == 6
