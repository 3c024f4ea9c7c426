"""The oracle of `gdn_conv_prep` with a pool of states and without its activation, on numbers to check with a pencil.

The taps are 10,000, 1,000 and 100, oldest first, as in the tests of the op without a pool.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.reference.test_gdn_conv_prep import TAPS, X, call, column, starts

# Three slots of three columns, of which the conv looks back at two: q's channel holds 7, 8, 9, ten and hundred times.
POOL = np.array([[[7, 8, 9], [0, 0, 0], [4, 5, 6]]], np.float32) * np.array([1, 10, 100], np.float32)[:, None, None]


def of_q(pool: np.ndarray) -> list[Any]:
    """What the slots hold of q's channel."""
    return pool[:, 0].tolist()


def flags(*values: bool) -> np.ndarray:
    return np.array(values)


def test_a_sequence_reads_the_last_columns_of_its_slot_and_moves_all_of_them() -> None:
    *parts, last, pool = call(X[:1], state_pool=POOL, state_indices=starts(1))
    assert column(parts[0]) == [800_000 + 90_000 + 100]
    assert column(parts[2]) == [500_000 + 60_000 + 700]
    assert of_q(pool) == [[7, 8, 9], [80, 90, 1], [700, 800, 900]]
    assert pool[1, 2].tolist() == [50, 60, 7]
    assert last.shape == (0, 3, 2)


def test_the_pool_itself_is_not_written() -> None:
    before = POOL.copy()
    assert call(state_pool=POOL)[6] is not POOL
    np.testing.assert_array_equal(POOL, before)


def test_a_sequence_without_indices_has_the_slot_of_its_number() -> None:
    q, *_, pool = call(state_pool=POOL, cu_seqlens=starts(0, 1, 3))
    assert column(q) == [80_000 + 9_000 + 100, 800_000 + 90_000 + 200, 900_000 + 2_000 + 300]
    assert of_q(pool) == [[8, 9, 1], [90, 2, 3], [700, 800, 900]]


@pytest.mark.parametrize("index", [-1, 3, -4])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_what_is_no_slot_is_neither_read_nor_written(dtype: Any, index: int) -> None:
    indices = starts(2, index, dtype=dtype)
    q, *_, pool = call(state_pool=POOL, state_indices=indices, cu_seqlens=starts(0, 1, 3))
    assert column(q)[1:] == [200, 2_300]
    assert of_q(pool) == [[7, 8, 9], [70, 80, 90], [800, 900, 1]]


def test_without_an_initial_state_a_slot_is_written_but_not_read() -> None:
    given: dict[str, Any] = {"state_indices": starts(2, 0), "has_initial_state": flags(False, True)}
    q, *_, pool = call(state_pool=POOL, cu_seqlens=starts(0, 1, 3), **given)
    assert column(q) == [100, 80_000 + 9_000 + 200, 90_000 + 2_000 + 300]
    assert of_q(pool) == [[9, 2, 3], [70, 80, 90], [0, 0, 1]]


def test_an_empty_sequence_keeps_its_slot_or_clears_it() -> None:
    given: dict[str, Any] = {"cu_seqlens": starts(0, 0, 0, 0), "has_initial_state": flags(True, False, True)}
    for x in (X, X[:0]):
        assert of_q(call(x, state_pool=POOL, **given)[6]) == [[7, 8, 9], [0, 0, 0], [700, 800, 900]]


def test_rows_past_the_last_sequence_have_no_state() -> None:
    q, *_, pool = call(state_pool=POOL, cu_seqlens=starts(0, 1))
    assert column(q)[1:] == [200, 2_300]
    assert of_q(pool)[0] == [8, 9, 1]


def test_a_pool_of_as_many_columns_as_the_conv_looks_back_at() -> None:
    q, *_, pool = call(state_pool=POOL[:, :, 1:], state_indices=starts(2))
    assert column(q)[0] == 8_000_000 + 900_000 + 100
    assert of_q(pool)[2] == [2, 3]


def test_a_state_is_read_in_its_own_dtype() -> None:
    """259 is 260 in bfloat16, of which x is."""
    x, weight = np.zeros((1, 3), ml_dtypes.bfloat16), np.tile(np.array([1, 0], np.float32), (3, 1))
    given: dict[str, Any] = {"bias": np.full(3, -256, np.float32), "activation": None}
    state = np.full((1, 3, 1), 259, np.float32)
    for name in ("initial_state", "state_pool"):
        assert column(call(x, weight, **given, **{name: state})[2]) == [3]


def test_a_copy_into_another_dtype_is_rounded_once() -> None:
    """257 is 256 in bfloat16, and 259 is 260."""
    x, state = np.array([[257, 259, 3]], np.float32), np.ones((1, 3, 2), ml_dtypes.bfloat16)
    *_, last = call(x, initial_state=state, output_final_state=True)
    *_, pool = call(x, state_pool=state)
    for result in (last, pool):
        assert result.dtype == ml_dtypes.bfloat16
        assert result.tolist() == [[[1, 256], [1, 260], [1, 3]]]
    assert call(x, output_final_state=True)[5].dtype == np.float32


def test_without_an_activation_the_results_are_the_conv() -> None:
    q, k, v, *_ = call(-X, TAPS, activation=None)
    assert column(q) == [-100, -1_200, -12_300]
    assert column(k) == [-400, -4_500, -45_600]
    assert column(v) == [-700, -7_800, -78_900]


def test_without_an_activation_the_bound_is_that_of_the_conv() -> None:
    """Six roundings of |c|, and the weights that a flushed input could have."""
    found = call(X[:1], intervals=True, activation=None)["v"]
    assert found.high.item() - 700 == pytest.approx(6 * 2.0**-24 * 700, rel=1e-6)
    silu = call(X[:1], intervals=True)["v"]
    assert silu.high.item() - 700 > 100 * (found.high.item() - 700)
