"""The oracle of `gated_rms_norm` on numbers that a reader can check with a pencil."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from polyfuse.reference import oracle

gated_rms_norm = oracle("gated_rms_norm")

ULP = 2.0**-24  # one float32 rounding, as the spec counts them
FLUSH = 2.0**-126  # what a flushed number can change
INF, NAN = np.inf, np.nan

# Four columns with a mean square of 1, and the eps that makes the root 2.
ROW = np.array([[1, -1, 1, 1]], np.float32)
EPS = 3.0
ONES = np.ones(4, np.float32)
OPEN = np.full((1, 4), INF, np.float32)  # a gate whose sigmoid is 1


def call(x: Any, gate: Any = OPEN, weight: Any = ONES, intervals: bool = False, **attrs: Any) -> Any:
    """With sigmoid and that eps unless told otherwise."""
    run = gated_rms_norm.intervals if intervals else gated_rms_norm
    return run(x, gate, weight, **{"eps": EPS, "activation": "sigmoid"} | attrs)


def row(*values: float, dtype: Any = np.float32) -> Any:
    return np.array([values], dtype)


def test_a_row_is_divided_by_its_root_mean_square() -> None:
    # Mean squares 1 and 6, plus 3: the roots are 2 and 3.
    x = np.concatenate([ROW, row(2, 2, 4, 0)])
    y = call(x, np.concatenate([OPEN, OPEN]))
    assert y.tolist() == [[0.5, -0.5, 0.5, 0.5], [float(np.float32(2 / 3))] * 2 + [float(np.float32(4 / 3)), 0]]


def test_each_column_has_its_weight_and_the_offset() -> None:
    weight = np.array([1, 2, -4, 0], np.float32)
    assert call(ROW, weight=weight).tolist() == [[0.5, -1, -2, 0]]
    assert call(ROW, weight=weight, weight_offset=1.0).tolist() == [[1, -1.5, -1.5, 0.5]]


def test_the_offset_is_that_of_float32() -> None:
    # The float32 nearest to 0.1 is 0.1 + 1.5e-9, which is left over where the weight is minus that.
    tenth = np.float32(0.1)
    y = call(row(1, 1, 1, 1), weight=np.full(4, -tenth), weight_offset=0.1)
    assert y.tolist() == [[0, 0, 0, 0]]


def test_the_gate_is_activated() -> None:
    gate = row(0, 100, -100, -INF)
    # sigmoid: 1/2, 1, exp(-100), 0; silu: that times the gate.
    tail = 0.5 * np.exp(-100.0)
    assert call(row(1, 1, 1, 1), gate).tolist() == [[0.25, 0.5, float(np.float32(tail)), 0]]
    np.testing.assert_array_equal(
        call(row(1, 1, 1, 1), gate, activation="silu"), row(0, 50, float(np.float32(-100 * tail)), NAN)
    )


def test_the_gate_is_no_part_of_the_mean() -> None:
    gate = row(0, INF, INF, INF)
    assert call(ROW, gate).tolist() == [[0.25, -0.5, 0.5, 0.5]]


def test_the_result_is_rounded_once_to_the_dtype_of_x() -> None:
    # n = 1/3, then times 3 * (1 - 2**-8): 1 - 2**-8 is a bfloat16, but not the product with 1/3 rounded to bfloat16.
    x = np.array([[1, 1, 1, 1]], ml_dtypes.bfloat16)
    y = call(x, weight=np.full(4, 3 * (1 - 2.0**-8), np.float32), eps=8.0)
    assert y.dtype == ml_dtypes.bfloat16
    assert y.astype(np.float64).tolist() == [[1 - 2.0**-8] * 4]


def test_nan_stays_where_it_belongs() -> None:
    x = np.concatenate([row(1, NAN, 1, 1), ROW])
    y = call(x, np.concatenate([OPEN, row(INF, INF, NAN, INF)]), np.array([NAN, 1, 1, 1], np.float32))
    np.testing.assert_array_equal(y, [[NAN] * 4, [NAN, -0.5, NAN, 0.5]])


def test_a_sum_of_squares_beyond_float32_is_infinite() -> None:
    # 2**64 squared is 2**128, past the largest float32: finite elements become 0. Infinity times 0 is NaN.
    assert call(row(2.0**64, 1, 0, 0)).tolist() == [[0, 0, 0, 0]]
    np.testing.assert_array_equal(call(row(INF, 1, 0, 0)), row(NAN, 0, 0, 0))


def test_a_product_with_the_weight_beyond_float32_is_infinite() -> None:
    # The mean square is 89: n is 1.6 and 1. The first passes float32, which the gate, coming last, does not undo.
    weight = np.full(4, 1.5 * 2.0**127, np.float32)
    y = call(row(16, 10, 0, 0), row(-50, -50, 0, 0), weight, eps=11.0)
    assert y.tolist() == [[INF, float(np.float32(1.5 * 2.0**127 * np.exp(-50.0))), 0, 0]]


def test_a_zero_row_gives_zeros() -> None:
    for eps in (EPS, 1e-6, 1e-60):
        assert call(row(0, 0, 0, 0), eps=eps).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4), (0,)])
def test_nothing(shape: tuple[int, ...]) -> None:
    none = np.zeros(shape, np.float32)
    assert call(none, none, np.ones(shape[-1], np.float32)).shape == shape


def test_any_strides_are_the_same_numbers() -> None:
    # The gate as the second part of each head's columns.
    x = np.tile(ROW, (6, 1)).reshape(3, 2, 4)
    wide = np.full((3, 2, 3, 4), NAN, np.float32)
    wide[:, :, 1] = np.arange(24).reshape(3, 2, 4)
    gate = wide[:, :, 1]
    assert gate.strides[:-1] != gate.copy().strides[:-1]
    np.testing.assert_array_equal(call(x, gate, activation="silu"), call(x, gate.copy(), activation="silu"))


def test_the_interval() -> None:
    # V = 4: sqrt(4) / 2 + 10 = 11 roundings of y, and 8 of act. The gate is 0: act is 1/2, and y 1/4.
    y = call(row(1, 1, 1, 1), row(0, 0, 0, 0), intervals=True)["y"]
    assert y.value.tolist() == [[0.25] * 4]
    # One flush of y; act 1/2 times what else it has: n = 1/2, the weight 1, x by 1/2; 2 of act and the gate by n.
    flushes = 1 + 0.5 * (1 + 0.5 + 1.5) + 0.25 / EPS + 2 * 0.5
    np.testing.assert_allclose(y.high - 0.25, (11 + 8) * ULP * 0.25 + flushes * FLUSH, rtol=1e-8)
    np.testing.assert_allclose(0.25 - y.low, (11 + 8) * ULP * 0.25 + flushes * FLUSH, rtol=1e-8)


@pytest.mark.parametrize(("gate", "magnitude"), [(64, 1), (-64, 65), (0, 1)])
def test_the_interval_of_act_grows_below_zero(gate: float, magnitude: float) -> None:
    y = call(row(1, 1, 1, 1), row(*[gate] * 4), activation="silu", intervals=True)["y"]
    value = 0.5 * gate / (1 + np.exp(-gate))
    np.testing.assert_allclose(y.value, row(*[value] * 4, dtype=np.float64), rtol=1e-14)
    np.testing.assert_allclose(y.high - y.value, (11 + 8 * magnitude) * ULP * abs(value), rtol=1e-6, atol=100 * FLUSH)


def test_where_zero_may_meet_infinity_both_outcomes_are_right() -> None:
    # sigmoid(-100) is subnormal: a weight of infinity gives infinity, or NaN where it counts as 0.
    y = call(row(1, 1, 1, 1), row(-100, 100, -100, 100), np.array([INF, INF, -INF, 1], np.float32), intervals=True)["y"]
    np.testing.assert_array_equal(y.value, row(NAN, INF, NAN, 0.5, dtype=np.float64))
    assert y.low[0, :3].tolist() == y.high[0, :3].tolist() == [INF, INF, -INF]
