"""The oracle of `gdn_in_proj` on numbers that a reader can check with a pencil."""

import ml_dtypes
import numpy as np
import pytest

from polyfuse import SpecError
from polyfuse.reference import oracle
from polyfuse.spec.gdn_in_proj import STRATEGIES

gdn_in_proj = oracle("gdn_in_proj")

ULP = 2.0**-24  # one float32 rounding, as the spec counts them

X = np.array([[1, 2], [-1, 0.5]], np.float32)
W_QKVZ = np.array([[3, 4], [5, 6], [0, -2]], np.float32)
W_BA = np.array([[0.5, 0.25]], np.float32)
# 1*3 + 2*4 = 11, 1*5 + 2*6 = 17, 1*0 - 2*2 = -4; -1*3 + 0.5*4 = -1, -1*5 + 0.5*6 = -2, -0.5*2 = -1.
QKVZ = [[11, 17, -4], [-1, -2, -1]]
# 1*0.5 + 2*0.25 = 1; -1*0.5 + 0.5*0.25 = -0.375.
BA = [[1], [-0.375]]


def padded(*values: float, width: int = 32) -> np.ndarray:
    """One row of so many columns that begins with `values`; the others are zero."""
    return np.array([[*values, *[0.0] * (width - len(values))]], np.float32)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_products(strategy: str) -> None:
    qkvz, ba = gdn_in_proj(X, W_QKVZ, W_BA, strategy=strategy)
    assert qkvz.tolist() == QKVZ
    assert ba.tolist() == BA
    assert (qkvz.dtype, ba.dtype) == (np.float32, np.float32)


def test_each_bias_goes_to_its_own_product() -> None:
    qkvz, ba = gdn_in_proj(X, W_QKVZ, W_BA, bias_qkvz=np.array([10, 20, 30], np.float32))
    assert qkvz.tolist() == [[21, 37, 26], [9, 18, 29]]
    assert ba.tolist() == BA
    qkvz, ba = gdn_in_proj(X, W_QKVZ, W_BA, bias_ba=np.array([0.5], np.float32))
    assert qkvz.tolist() == QKVZ
    assert ba.tolist() == [[1.5], [0.125]]


def test_the_rows_of_w_z_and_w_a_follow_those_of_the_first_weights() -> None:
    # 1*1 + 2*1 = 3 and -1*1 + 0.5*1 = -0.5; 1*2 + 2*0 = 2 and -1*2 + 0.5*0 = -2.
    w_z, w_a = np.array([[1, 1]], np.float32), np.array([[2, 0]], np.float32)
    with_z = [[11, 17, -4, 3], [-1, -2, -1, -0.5]]
    with_a = [[1, 2], [-0.375, -2]]
    qkvz, ba = gdn_in_proj(X, W_QKVZ, W_BA, w_z=w_z)
    assert (qkvz.tolist(), ba.tolist()) == (with_z, BA)
    qkvz, ba = gdn_in_proj(X, W_QKVZ, W_BA, w_a=w_a)
    assert (qkvz.tolist(), ba.tolist()) == (QKVZ, with_a)
    qkvz, ba = gdn_in_proj(X, W_QKVZ, W_BA, w_z=w_z, w_a=w_a, bias_ba=np.array([10, 20], np.float32))
    assert (qkvz.tolist(), ba.tolist()) == (with_z, [[11, 22], [9.625, 18]])


def test_a_bias_is_as_wide_as_its_result() -> None:
    w_z, bias = np.ones((2, 2), np.float32), np.ones(3, np.float32)
    gdn_in_proj(X, W_QKVZ, W_BA, bias_qkvz=bias)
    with pytest.raises(SpecError, match=r"gdn_in_proj: bias_qkvz: expected M1=5 in \[M1\], got \[3\]"):
        gdn_in_proj(X, W_QKVZ, W_BA, w_z=w_z, bias_qkvz=bias)


def test_leading_dimensions_are_rows() -> None:
    qkvz, ba = gdn_in_proj(X.reshape(2, 1, 2), W_QKVZ, W_BA)
    assert qkvz.tolist() == [[QKVZ[0]], [QKVZ[1]]]
    assert ba.tolist() == [[BA[0]], [BA[1]]]


def test_any_strides_are_the_same_numbers() -> None:
    qkvz, _ = gdn_in_proj(np.asfortranarray(X), np.repeat(W_QKVZ, 2, axis=0)[::2], W_BA)
    assert qkvz.tolist() == QKVZ


def test_a_tie_goes_to_even_in_bfloat16() -> None:
    # The step of bfloat16 at 1 is 2**-7: 1 + 1/2 step goes down to 1, 1 + 3/2 steps up to 1 + 2 steps.
    x = np.array([[1, 2.0**-8], [1, 3 * 2.0**-8]], ml_dtypes.bfloat16)
    w = np.ones((1, 2), ml_dtypes.bfloat16)
    qkvz, _ = gdn_in_proj(x, w, w)
    assert qkvz.dtype == ml_dtypes.bfloat16
    assert qkvz.astype(np.float64).tolist() == [[1], [1 + 2.0**-6]]


def test_the_bias_is_added_before_the_one_rounding() -> None:
    # 1 + 2**-8 is a tie, which alone would go down to 1; a little more goes up, where 1 + 2**-20 would not.
    x = np.array([[1, 2.0**-8]], ml_dtypes.bfloat16)
    w = np.ones((1, 2), ml_dtypes.bfloat16)
    qkvz, ba = gdn_in_proj(x, w, w, bias_qkvz=np.array([2.0**-20], ml_dtypes.bfloat16))
    assert float(qkvz[0, 0]) == 1 + 2.0**-7
    assert float(ba[0, 0]) == 1


def test_sums_are_wider_than_float32() -> None:
    # In float32, 2**24 + 1 is 2**24, and so is that + 1.
    x = np.array([[2.0**24, 1, 1]], np.float32)
    w = np.ones((1, 3), np.float32)
    assert gdn_in_proj(x, w, w)[0].tolist() == [[2.0**24 + 2]]


def test_beyond_the_dtype_is_infinite_and_nan_fills_its_row() -> None:
    x = np.array([[40_000, 40_000], [np.nan, 0], [np.inf, 1]], np.float16)
    w = np.array([[1, 1], [0, 1]], np.float16)
    qkvz, _ = gdn_in_proj(x, w, w)
    # 80,000 is beyond float16's 65,504; infinity times 0 is NaN.
    np.testing.assert_array_equal(qkvz, np.array([[np.inf, 40_000], [np.nan, np.nan], [np.inf, np.nan]], np.float16))


def test_no_rows_no_columns_and_weights_without_rows() -> None:
    none = np.zeros((0, 2), np.float32)
    assert [part.shape for part in gdn_in_proj(none, W_QKVZ, W_BA)] == [(0, 3), (0, 1)]
    assert [part.shape for part in gdn_in_proj(X, W_QKVZ, none)] == [(2, 3), (2, 0)]
    assert [part.tolist() for part in gdn_in_proj(X, none, W_BA, w_z=W_QKVZ, w_a=none)] == [QKVZ, BA]
    bias = np.array([1, 2, 3], np.float32)
    qkvz, ba = gdn_in_proj(X[:, :0], W_QKVZ[:, :0], W_BA[:, :0], bias_qkvz=bias)
    assert qkvz.tolist() == [[1, 2, 3], [1, 2, 3]]
    assert ba.tolist() == [[0], [0]]


def test_the_interval_is_the_accumulators_error_and_that_of_the_sum() -> None:
    # x @ w = 1.5 - 1 = 0.5 and |x| @ |w| = 2.5. Of 32 columns the accumulator errs by 32 / 16 = 2 roundings of 0.5,
    # the sum by 8 of 2.5: 2 * 0.5 + 8 * 2.5 = 21. With a bias of 0.25: 2 * 0.75 + 8 * 2.75 = 23.5.
    x, w = padded(1.5, -1), padded(1, 1)
    found = gdn_in_proj.intervals(x, w, w, bias_ba=np.array([0.25], np.float32))
    for name, value, roundings in (("qkvz", 0.5, 21), ("ba", 0.75, 23.5)):
        ends = found[name].low, found[name].value, found[name].high
        assert [end.tolist() for end in ends] == [[[value - roundings * ULP]], [[value]], [[value + roundings * ULP]]]


def test_short_sums_of_integers_are_exact() -> None:
    # |x| @ |w| = 2**24 - 1 is below 2**24, where every partial sum is a float32 number; 2**24 is not.
    w = padded(1, 1)
    below = gdn_in_proj.intervals(padded(2.0**24 - 2, -1), w, w)["qkvz"]
    assert below.low.tolist() == below.high.tolist() == [[2.0**24 - 3]]
    at = gdn_in_proj.intervals(padded(2.0**24 - 1, -1), w, w)["qkvz"]
    # 2 * (2**24 - 2) + 8 * 2**24 roundings are 10 - 2**-22.
    assert (at.high - at.value).tolist() == (at.value - at.low).tolist() == [[10 - 4 * ULP]]
    # The rows of w_z count as those of w_qkvz do: one fraction among them makes every sum inexact.
    mixed = gdn_in_proj.intervals(padded(3, 4), w, w, w_z=w / 2)["qkvz"]
    assert mixed.value.tolist() == [[7, 3.5]]
    assert (mixed.high - mixed.value).tolist() == [[(2 + 8) * 7 * ULP, (2 + 8) * 3.5 * ULP]]
    # A bias that is no integer makes the sum inexact.
    biased = gdn_in_proj.intervals(padded(3, 4), w, w, bias_qkvz=np.array([0.5], np.float32))["qkvz"]
    assert (biased.high - biased.value).tolist() == [[(2 * 7.5 + 8 * 7.5) * ULP]]


def test_infinity_and_nan_stand_for_themselves() -> None:
    found = gdn_in_proj.intervals(padded(np.inf, 0.5), padded(1, 1), padded(0, 1))
    assert found["qkvz"].low.tolist() == found["qkvz"].high.tolist() == [[np.inf]]
    assert np.isnan(found["ba"].low).all()
    assert np.isnan(found["ba"].high).all()
