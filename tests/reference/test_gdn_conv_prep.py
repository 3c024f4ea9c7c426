"""The oracle of `gdn_conv_prep` on numbers that a reader can check with a pencil.

Of 40 and more sigmoid is 1 in float64, so that SiLU is the identity and what the conv adds up can be read off. Its taps
are 10,000, 1,000 and 100, oldest first: inputs 1, 2, 3 give 100; 1,000 + 200; 10,000 + 2,000 + 300.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from polyfuse.conformance import Case, make_inputs
from polyfuse.reference import oracle
from tests import interleaved

gdn_conv_prep = oracle("gdn_conv_prep")

ULP = 2.0**-24  # one float32 rounding, as the spec counts them
FLUSH = 2.0**-126  # what a flushed number can change

# One head of one column each: the three channels of a row are q, k and v.
HEADS: dict[str, Any] = {"num_k_heads": 1, "head_k_dim": 1, "head_v_dim": 1, "l2norm": False}
TAPS = np.tile(np.array([10_000, 1_000, 100], np.float32), (3, 1))
X = np.array([[1, 4, 7], [2, 5, 8], [3, 6, 9]], np.float32)
STATE = np.array([[[8, 9], [0, 0], [5, 6]]], np.float32)  # of one sequence, per channel: oldest first


def call(
    x: np.ndarray = X,
    weight: np.ndarray = TAPS,
    a: float = 0,
    b: float = 0,
    A_log: float = 0,
    dt_bias: float = 0,
    intervals: bool = False,
    **options: Any,
) -> Any:
    """The results of these rows, or their intervals; the gates of all rows are the same."""
    gates = [np.full((len(x), 1), value, np.float32) for value in (a, b)]
    heads = [np.full(1, value, np.float32) for value in (A_log, dt_bias)]
    run = gdn_conv_prep.intervals if intervals else gdn_conv_prep
    return run(x, weight, *gates, *heads, **HEADS | options)


def starts(*values: int, dtype: Any = np.int32) -> np.ndarray:
    return np.array(values, dtype)


def column(part: np.ndarray) -> list[float]:
    """A result of one head of one column, row by row."""
    return part.reshape(-1).tolist()


def test_the_conv_of_each_channel() -> None:
    q, k, v, _, _, _ = call()
    assert column(q) == [100, 1_200, 12_300]
    assert column(k) == [400, 4_500, 45_600]
    assert column(v) == [700, 7_800, 78_900]


def test_a_width_of_two() -> None:
    assert column(call(weight=TAPS[:, 1:])[0]) == [100, 1_200, 2_300]


def test_the_bias_is_added_before_the_silu() -> None:
    assert column(call(bias=np.array([-50, 0, 7], np.float32))[0]) == [50, 1_150, 12_250]
    assert column(call(bias=np.array([-50, 0, 7], np.float32))[2]) == [707, 7_807, 78_907]


def test_silu() -> None:
    # c = 0, 1, -1, 100, -100: c / (1 + exp(-c)).
    x = np.array([[0, 1, -1], [100, -100, 50]], np.float32)
    q, k, v, _, _, _ = call(x, np.tile(np.array([0, 1], np.float32), (3, 1)))
    assert column(q) == [0, 100]
    assert column(k) == [float(np.float32(1 / (1 + np.exp(-1.0)))), float(np.float32(-100 * np.exp(-100.0)))]
    assert column(v) == [float(np.float32(-1 / (1 + np.exp(1.0)))), 50]


def test_what_comes_before_the_first_row_is_in_the_initial_state() -> None:
    q, _, v, _, _, _ = call(initial_state=STATE)
    # 8, 9 | 1, 2, 3: 80,000 + 9,000 + 100 and 90,000 + 1,000 + 200.
    assert column(q) == [89_100, 91_200, 12_300]
    assert column(v) == [50_000 + 6_000 + 700, 60_000 + 7_000 + 800, 78_900]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_packed_sequences_do_not_see_one_another(dtype: Any) -> None:
    q, *_ = call(cu_seqlens=starts(0, 1, 3, dtype=dtype))
    assert column(q) == [100, 200, 2_300]
    # Two empty sequences; and rows past the last one, which are one more sequence, without a state.
    q, *_ = call(cu_seqlens=starts(0, 0, 1, 1), initial_state=np.concatenate([STATE, 2 * STATE, STATE]))
    assert column(q) == [160_000 + 18_000 + 100, 200, 2_300]


def test_rows_before_the_first_sequence_have_no_state() -> None:
    q, *_ = call(cu_seqlens=starts(2, 3), initial_state=STATE)
    assert column(q) == [100, 1_200, 80_000 + 9_000 + 300]


def test_the_final_state_is_the_last_inputs_of_each_sequence() -> None:
    cu_seqlens = starts(0, 1, 1, 3)
    states = np.concatenate([STATE, 10 * STATE, STATE])
    *_, last = call(cu_seqlens=cu_seqlens, initial_state=states, output_final_state=True)
    # One row after 8, 9; none after 80, 90; two.
    assert last[:, 0].tolist() == [[9, 1], [80, 90], [2, 3]]
    assert last[:, 2].tolist() == [[6, 7], [50, 60], [8, 9]]
    *_, last = call(cu_seqlens=cu_seqlens, output_final_state=True)
    assert last[:, 0].tolist() == [[0, 1], [0, 0], [2, 3]]
    # In memory rows of channels: 3 * 2 numbers a sequence, 3 a row.
    assert [step // last.itemsize for step in last.strides] == [6, 1, 3]


def test_the_final_state_is_an_initial_state() -> None:
    whole = call(initial_state=STATE)
    *_, middle = call(X[:2], initial_state=STATE, output_final_state=True)
    assert column(call(X[2:], initial_state=middle)[0]) == column(whole[0])[2:]


def test_without_output_final_state_it_has_no_sequences() -> None:
    assert call()[5].shape == (0, 3, 2)


def test_no_rows() -> None:
    *parts, last = call(X[:0], initial_state=STATE, output_final_state=True)
    assert [part.shape for part in parts] == [(0, 1, 1), (0, 1, 1), (0, 1, 1), (0, 1), (0, 1)]
    assert last.tolist() == STATE.tolist()
    assert call(X[:0], output_final_state=True)[5].tolist() == np.zeros((1, 3, 2)).tolist()


def test_the_norm_is_of_the_activated_conv() -> None:
    # y = 100, 1,200: 100 / sqrt(10,000 + 6,384) = 100 / 128, and 1,200 / sqrt(1,446,384), which is no whole number.
    q, k, v, _, _, _ = call(l2norm=True, l2norm_eps=6384.0)
    assert column(q)[0] == 100 / 128
    assert column(q)[1] == float(np.float32(1_200 / np.sqrt(1_446_384)))
    assert column(k)[0] == float(np.float32(400 / np.sqrt(166_384)))
    assert column(v) == [700, 7_800, 78_900]


def test_heads_are_consecutive_channels() -> None:
    # Channels: two heads of q, two of k, one of v with four columns. The conv multiplies by 100.
    x, weight = np.arange(1, 9, dtype=np.float32)[None], np.tile(np.array([0, 100], np.float32), (8, 1))
    q, k, v, _, _, _ = call(x, weight, num_k_heads=2, head_v_dim=4)
    assert q.tolist() == [[[100], [200]]]
    assert k.tolist() == [[[300], [400]]]
    assert v.tolist() == [[[500, 600, 700, 800]]]


def test_key_heads_of_a_projection() -> None:
    # Two key heads of q, k, two value heads of two columns, and as much of z. The conv multiplies by 100.
    first, second = [1, 2, 11, 12, 13, 14, np.nan, np.nan, -1, -2], [3, 4, 21, 22, 23, 24, np.nan, np.inf, -3, -4]
    x, weight = np.array([first + second], np.float32), np.tile(np.array([0, 100], np.float32), (12, 1))
    gates, heads = np.zeros((1, 4), np.float32), np.zeros(4, np.float32)
    options = HEADS | {"num_k_heads": 2, "head_v_dim": 2, "interleaved": True, "output_final_state": True}
    q, k, v, _, _, last = gdn_conv_prep(x, weight, gates, gates, heads, heads, **options)
    assert q.tolist() == [[[100], [300]]]
    assert k.tolist() == [[[200], [400]]]
    assert v.tolist() == [[[1100, 1200], [1300, 1400], [2100, 2200], [2300, 2400]]]
    assert last.tolist() == [[[1], [3], [2], [4], [11], [12], [13], [14], [21], [22], [23], [24]]]


@pytest.mark.parametrize("case", interleaved.CASES, ids=lambda case: case.name)
def test_interleaved_is_the_op_on_columns_in_order(case: Case) -> None:
    values = make_inputs(gdn_conv_prep.spec, case)
    for result, want in zip(gdn_conv_prep(**values), gdn_conv_prep(**interleaved.in_order(values)), strict=True):
        assert result.tobytes() == want.tobytes()


def test_gates_are_those_of_gdn_post_conv() -> None:
    g, beta = call(a=60, dt_bias=40, b=-np.inf)[3:5]
    assert column(g) == [-100] * 3  # softplus(100)
    assert column(beta) == [0] * 3
    g, beta = call(a=-np.inf, output_g_exp=True)[3:5]
    assert column(g) == [1] * 3
    assert column(beta) == [0.5] * 3
    assert column(call(A_log=1)[3]) == [float(np.float32(-np.e * np.log(2)))] * 3


def test_the_conv_is_not_rounded_and_a_tie_goes_to_even() -> None:
    # c = 256 + 1 and 256 + 3: the step of bfloat16 is 2 there, and 256 and 260 are the even neighbours.
    x = np.array([[0, 0, 256]], ml_dtypes.bfloat16)
    weight = np.tile(np.array([0, 1], ml_dtypes.bfloat16), (3, 1))
    for bias, want in ((1, 256), (3, 260)):
        v = call(x, weight, bias=np.array([0, 0, bias], ml_dtypes.bfloat16))[2]
        assert v.dtype == ml_dtypes.bfloat16
        assert column(v.astype(np.float64)) == [want]


def test_nan_spoils_as_many_rows_as_the_conv_is_wide_of_its_sequence() -> None:
    x = np.tile(X[:1], (6, 1))
    x[0, 2] = x[1, 0] = np.nan
    q, k, v, g, beta, _ = call(x, cu_seqlens=starts(0, 5, 6))
    assert np.isnan(column(v)).tolist() == [True, True, True, False, False, False]
    assert np.isnan(column(q)).tolist() == [False, True, True, True, False, False]
    assert not any(np.isnan(part).any() for part in (k, g, beta))


def test_an_infinite_weight_times_nothing_is_nan() -> None:
    weight = TAPS.copy()
    weight[0, 0] = np.inf
    q, *_ = call(weight=weight)
    np.testing.assert_array_equal(column(q), [np.nan, np.nan, np.inf])


def test_silu_of_minus_infinity_is_nan() -> None:
    x = X.copy()
    x[0] = -np.inf, np.inf, -1e38
    q, k, v, _, _, _ = call(x)
    assert np.isnan(column(q)[0])
    assert column(k)[0] == np.inf
    assert np.isnan(column(v)[0])  # 100 * -1e38 is beyond float32


def test_a_sum_of_squares_beyond_float32_is_infinite() -> None:
    # y = 100 * 2**64.
    x = np.full((1, 3), 2.0**64, np.float32)
    assert column(call(x, l2norm=True)[0]) == [0]
    assert column(call(x)[0]) == [100 * 2.0**64]


# One tap of 1 on x = 100, one of 0 on nothing: c = y = 100. c errs by 6 roundings of 100 and flushes itself and an
# input of weight 1; SiLU passes on 1.1 of that, errs by 8 roundings of 100 * (1 + 100), and flushes itself once and a
# sigmoid 100 times.
OF_C = 6 * ULP * 100 + FLUSH * (1 + 1)
OF_Y = 1.1 * OF_C + (8 * ULP * 100 * 101 + FLUSH * 101)


def one_tap(**options: Any) -> Any:
    weight = np.tile(np.array([0, 1], np.float32), (3, 1))
    return call(np.full((1, 3), 100, np.float32), weight, intervals=True, **options)


def test_the_interval_of_the_conv_and_its_silu() -> None:
    found = one_tap()
    for name in ("q", "k", "v"):
        exact = found[name]
        assert column(exact.value) == [100]
        assert column(exact.low) == [100 - OF_Y]
        assert column(exact.high) == [100 + OF_Y]


def test_the_magnitude_of_the_conv_has_no_signs() -> None:
    # -2 * 100 + 300: 6 roundings of 200 + 300, and inputs that count |-2| = 2.
    weight = np.tile(np.array([0, -2], np.float32), (3, 1))
    bias = np.full(3, 300, np.float32)
    exact = call(np.full((1, 3), 100, np.float32), weight, bias=bias, intervals=True)["v"]
    of_c = 6 * ULP * 500 + FLUSH * (1 + 2)
    assert column(exact.high) == [100 + (1.1 * of_c + (8 * ULP * 100 * 101 + FLUSH * 101))]


def test_the_interval_passes_through_the_norm() -> None:
    # K = 1: sqrt(1) / 2 + 6 roundings of 100 / 128, and flushes of itself and of an input. The lowest y over the
    # longest vector that the others allow, and the highest over the shortest: here both are y itself.
    exact = one_tap(l2norm=True, l2norm_eps=6384.0)["q"]
    own = 6.5 * ULP * (100 / 128) + FLUSH * (1 + 1 / 128)
    low, high = 100 - OF_Y, 100 + OF_Y
    assert column(exact.value) == [100 / 128]
    assert column(exact.low) == [low * (1 / np.sqrt(high * high + 6384)) - own]
    assert column(exact.high) == [high * (1 / np.sqrt(low * low + 6384)) + own]


def test_the_final_state_is_a_point_with_its_sign() -> None:
    x = np.array([[-0.0, 0.0, 2.0**-149]], np.float32)
    exact = call(x, TAPS[:, 1:], output_final_state=True, intervals=True)["final_state"]
    assert exact.bits
    assert exact.low.tobytes() == exact.value.tobytes() == exact.high.tobytes()
    assert np.signbit(exact.value[0, 0, 0])


def test_the_interval_of_the_gates_is_that_of_gdn_post_conv() -> None:
    found = one_tap(a=100, b=64)
    assert column(found["g"].high) == [-100 + (8 * ULP * 100 + 2 * FLUSH)]
    assert column(found["beta"].high) == [1 + (6 * ULP * 65 + FLUSH)]
