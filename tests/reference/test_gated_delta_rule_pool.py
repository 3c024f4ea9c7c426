"""The oracle of `gated_delta_rule` with a pool of states, on states of one number."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from polyfuse.reference import oracle
from polyfuse.spec.gated_delta_rule import NAME
from tests.reference.test_gated_delta_rule import HALF, gates, numbers

POOL = np.array([2, 20, 200], np.float32).reshape(3, 1, 1, 1)


def call(rows: int = 2, *, intervals: bool = False, **changes: Any) -> Any:
    """Rows that halve the state, and add nothing to it unless another beta is given; o is the state."""
    ones = numbers(*[1] * rows)
    given = {"q": ones, "k": ones, "v": numbers(*[10] * rows), "g": gates(*[HALF] * rows)}
    given |= {"beta": gates(*[0] * rows), "state_pool": POOL, **changes}
    return (oracle(NAME).intervals if intervals else oracle(NAME))(**given)


def starts(*values: int, dtype: Any = np.int32) -> np.ndarray:
    return np.array(values, dtype)


def test_a_sequence_begins_from_its_slot_and_leaves_its_state_there() -> None:
    o, last, pool = call(state_indices=starts(1))
    np.testing.assert_allclose(o.ravel(), [10, 5])
    np.testing.assert_allclose(pool.ravel(), [2, 5, 200])
    assert last.shape == (0, 1, 1, 1)


def test_the_pool_itself_is_not_written() -> None:
    before = POOL.copy()
    assert call()[2] is not POOL
    np.testing.assert_array_equal(POOL, before)


def test_a_sequence_without_indices_has_the_slot_of_its_number() -> None:
    o, _, pool = call(3, cu_seqlens=starts(0, 1, 3))
    np.testing.assert_allclose(o.ravel(), [1, 10, 5])
    np.testing.assert_allclose(pool.ravel(), [1, 5, 200])


@pytest.mark.parametrize("index", [-1, 3, -3, -4])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_what_is_no_slot_is_neither_read_nor_written(dtype: Any, index: int) -> None:
    o, _, pool = call(3, state_indices=starts(2, index, dtype=dtype), cu_seqlens=starts(0, 1, 3))
    np.testing.assert_allclose(o.ravel(), [100, 0, 0])
    np.testing.assert_allclose(pool.ravel(), [2, 20, 100])


def test_without_an_initial_state_a_slot_is_written_but_not_read() -> None:
    pool = POOL.copy()
    pool[2] = np.nan
    flags, beta = np.array([False, True]), gates(1, 0, 0)
    given = {"state_indices": starts(2, 0), "has_initial_state": flags, "cu_seqlens": starts(0, 1, 3)}
    o, _, pool = call(3, state_pool=pool, beta=beta, **given)
    np.testing.assert_allclose(o.ravel(), [10, 1, 0.5])
    np.testing.assert_allclose(pool.ravel(), [0.5, 20, 10])


@pytest.mark.parametrize("rows", [2, 0])
def test_an_empty_sequence_keeps_its_slot_or_clears_it(rows: int) -> None:
    flags = np.array([True, False, True])
    pool = call(rows, cu_seqlens=starts(0, 0, 0, 0), has_initial_state=flags)[2]
    np.testing.assert_array_equal(pool.ravel(), [2, 0, 200])


def test_other_slots_must_keep_their_bits() -> None:
    exact = call(intervals=True, state_indices=starts(1))["state_pool"]
    np.testing.assert_array_equal(exact.kept.ravel(), [True, False, True])
    assert exact.low[1] < 5 < exact.high[1]


@pytest.mark.parametrize(("dtype", "want"), [(ml_dtypes.bfloat16, 260), (np.float16, 259), (np.float32, 259)])
def test_a_state_is_rounded_once_to_the_dtype_of_the_pool(dtype: Any, want: float) -> None:
    """259 is 260 in bfloat16."""
    pool = call(1, v=numbers(259), beta=gates(1), state_pool=np.ones((1, 1, 1, 1), dtype))[2]
    assert pool.dtype == dtype
    assert pool.ravel().tolist() == [want]


def test_the_interval_of_a_pool_is_that_of_a_final_state() -> None:
    given = {"v": numbers(3, 7), "beta": gates(0.5, 0.25)}
    exact = call(intervals=True, state_indices=starts(1), **given)["state_pool"]
    initial = {"state_pool": None, "initial_state": POOL[1:2], "output_final_state": True}
    wanted = call(intervals=True, **given | initial)["final_state"]
    for one, other in ((exact.value, wanted.value), (exact.low, wanted.low), (exact.high, wanted.high)):
        np.testing.assert_array_equal(one[1], other[0])
