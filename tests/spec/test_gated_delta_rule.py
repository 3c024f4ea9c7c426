"""Pools of states of `gated_delta_rule`: what they bind, cost and refuse."""

import re
from typing import Any

import numpy as np
import pytest

from polyfuse.spec import OPS, Call, SpecError, bind

NAME = "gated_delta_rule"
SPEC = OPS[NAME]
DEFAULTS: dict[str, Any] = {a.name: a.default for a in SPEC.attrs} | {t.name: None for t in SPEC.tensors if t.optional}


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def numbers(count: int) -> Any:
    return np.zeros(count, np.int32)


def call(**changes: Any) -> Call:
    """Seven rows of two key heads and four value heads."""
    arrays = {"q": zeros(7, 2, 3), "k": zeros(7, 2, 3), "v": zeros(7, 4, 5), "g": zeros(7, 4), "beta": zeros(7, 4)}
    return bind(SPEC, DEFAULTS | arrays | changes)


def pool(slots: int = 5, dtype: Any = np.float32, **changes: Any) -> Call:
    return call(state_pool=np.zeros((slots, 4, 3, 5), dtype), **changes)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_pool_is_updated_in_place_of_a_final_state(dtype: Any) -> None:
    bound = pool(dtype=dtype)
    assert [(output.name, output.shape) for output in bound.updated] == [("state_pool", (5, 4, 3, 5))]
    assert bound.outputs[1].shape == (0, 4, 3, 5)
    # The slot of one sequence is read, and written.
    size = 4 * 3 * 5 * np.dtype(dtype).itemsize
    assert SPEC.cost(bound).bytes_read - SPEC.cost(call()).bytes_read == size
    assert SPEC.cost(bound).bytes_written - SPEC.cost(call()).bytes_written == size
    assert SPEC.cost(bound).flops == SPEC.cost(call()).flops


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial_state": zeros(1, 4, 3, 5)}, "initial_state: expected None beside a state_pool, got an array; try"),
        ({"output_final_state": True}, "output_final_state: expected False beside a state_pool, which is updated"),
        ({"cu_seqlens": numbers(7)}, "state_pool: expected slots >= 6 in [slots, HV, K, V], got 5"),
        ({"slots": 0}, "state_pool: expected slots >= 1 in [slots, HV, K, V], got 0"),
        ({"slots": 0, "state_indices": numbers(1)}, "state_pool: expected slots >= 1 in [slots, HV, K, V], got 0"),
        ({"state_indices": numbers(2)}, "state_indices: expected S=1 in [S], got [2]"),
        ({"state_indices": zeros(1)}, "state_indices: expected dtype int32 or int64, got float32"),
        ({"has_initial_state": numbers(1)}, "has_initial_state: expected dtype bool, got int32"),
        ({"has_initial_state": np.zeros(3, bool)}, "has_initial_state: expected S=1 in [S], got [3]"),
        ({"dtype": np.float64}, "state_pool: expected dtype float32 or bfloat16 or float16, got float64"),
        ({"state_pool": zeros(5, 4, 5, 3)}, "state_pool: expected K=3 in [slots, HV, K, V], got [5, 4, 5, 3]"),
    ],
)
def test_what_does_not_fit_a_pool_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(f"{NAME}: {message}")):
        (call if "state_pool" in changes else pool)(**changes)


@pytest.mark.parametrize("name", ["state_indices", "has_initial_state"])
def test_what_needs_a_pool_is_refused_without_one(name: str) -> None:
    with pytest.raises(SpecError, match=f"{NAME}: {name}: expected None without a state_pool, got an array"):
        call(**{name: np.zeros(1, np.int32 if name == "state_indices" else bool)})


def test_six_sequences_fit_a_pool_of_five_slots_that_are_named() -> None:
    """-1 names none."""
    indices = np.array([0, 1, 2, 3, 4, -1], np.int32)
    assert pool(cu_seqlens=numbers(7), state_indices=indices).dims["S"] == 6
