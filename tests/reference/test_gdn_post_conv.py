"""The oracle of `gdn_post_conv` on numbers that a reader can check with a pencil."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from polyfuse.reference import oracle

gdn_post_conv = oracle("gdn_post_conv")

ULP = 2.0**-24  # one float32 rounding, as the spec counts them
FLUSH = 2.0**-126  # what a flushed number can change

HEADS: dict[str, Any] = {"num_k_heads": 1, "head_k_dim": 3, "head_v_dim": 2}
LN2 = np.log(2)


def rows(*values: list[float], dtype: Any = np.float32) -> np.ndarray:
    """Rows [q | k | v] of 3 + 3 + 2 columns."""
    return np.array(values, dtype)


def call(
    conv_out: np.ndarray,
    a: float = 0,
    b: float = 0,
    A_log: float = 0,
    dt_bias: float = 0,
    intervals: bool = False,
    **attrs: Any,
) -> Any:
    """The results of these rows, or their intervals; the gates of all rows are the same."""
    gates = [np.full((len(conv_out), 1), value, np.float32) for value in (a, b)]
    heads = [np.full(1, value, np.float32) for value in (A_log, dt_bias)]
    run = gdn_post_conv.intervals if intervals else gdn_post_conv
    return run(conv_out, *gates, *heads, **HEADS | attrs)


ROW = rows([1, 1, 0, 3, -2, 1, 7, -5])


def test_q_and_k_are_divided_by_their_length() -> None:
    # q: 1 + 1 + 0 + eps = 4, whose root is 2. k: 9 + 4 + 1 + eps = 16, whose root is 4.
    q, k, v, _, _ = call(ROW, l2norm_eps=2.0)
    assert q.tolist() == [[[0.5, 0.5, 0]]]
    assert k.tolist() == [[[0.75, -0.5, 0.25]]]
    assert v.tolist() == [[[7, -5]]]


def test_each_head_has_its_own_length() -> None:
    # Two heads of one column, then two heads of v: 3 / sqrt(9 + 16), 0 / sqrt(16), and 3 / 5 of float32.
    q, k, v, _, _ = call(rows([3, 0, 0, -3, 1, 2]), num_k_heads=2, head_k_dim=1, head_v_dim=2, l2norm_eps=16.0)
    assert q.tolist() == [[[float(np.float32(0.6))], [0]]]
    assert k.tolist() == [[[0], [float(np.float32(-0.6))]]]
    assert v.tolist() == [[[1, 2]]]


def test_gates_by_key_head() -> None:
    # softplus(100) = 100 and sigmoid(-inf) = 0: value head j has the gates of key head j // 3.
    conv_out, heads = np.ones((1, 2 * 2 * 3 + 6 * 2), np.float32), np.zeros(6, np.float32)
    a = np.array([[[100, 200, 300], [400, 500, 600]]], np.float32)
    b = np.array([[[0, -np.inf, np.inf], [0, 0, -np.inf]]], np.float32)
    options = HEADS | {"num_k_heads": 2}
    for a_given, b_given in ((a, b), (a.reshape(1, 6), b), (a, b.reshape(1, 6))):
        *_, g, beta = gdn_post_conv(conv_out, a_given, b_given, heads, heads, **options)
        assert g.tolist() == [[-100, -200, -300, -400, -500, -600]]
        assert beta.tolist() == [[0.5, 0, 1, 0.5, 0.5, 0]]


def test_results_are_rounded_once_to_the_dtype() -> None:
    # 4 + 1 + eps = 9: 2/3 and 1/3. In binary 1/3 is 1.0101010 10101... * 2**-2, which bfloat16 rounds up to 171/512.
    q, _, _, g, beta = call(rows([2, 1, 0, 0, 0, 0, 0, 0], dtype=ml_dtypes.bfloat16), l2norm_eps=4.0)
    assert q.astype(np.float64).tolist() == [[[171 / 256, 171 / 512, 0]]]
    assert [part.dtype for part in (q, g, beta)] == [ml_dtypes.bfloat16, np.float32, np.float32]


def test_without_the_norm_q_and_k_are_copies() -> None:
    row = rows([1, -0.0, 2.0**-149, 3, -2, np.inf, -0.0, np.nan])
    q, k, v, _, _ = call(row, l2norm=False)
    copied = np.concatenate([part.reshape(-1) for part in (q, k, v)])
    assert copied.tobytes() == row.tobytes()


def test_v_is_a_copy_with_the_norm_too() -> None:
    values = np.array([-0.0, 2.0**-149, np.nan, -np.inf], np.float32)
    _, _, v, _, _ = call(np.concatenate([ROW[0, :6], values])[None], head_v_dim=4)
    assert v.tobytes() == values.tobytes()


@pytest.mark.parametrize(
    ("a", "dt_bias", "A_log", "want"),
    [
        (0, 0, 0, -LN2),  # softplus(0) = log 2
        (-3, 3, 0, -LN2),
        (100, 0, 0, -100),  # softplus(x) = x far above 0
        (60, 40, 0, -100),
        (-100, 0, 0, -np.exp(-100.0)),  # and exp(x) far below
        (-np.inf, 0, 0, 0),
        (100, 0, -np.inf, 0),  # exp(A_log) = 0
        (np.inf, 0, 0, -np.inf),
    ],
)
def test_g(a: float, dt_bias: float, A_log: float, want: float) -> None:
    g = call(ROW, a=a, dt_bias=dt_bias, A_log=A_log)[3]
    assert g.tolist() == [[np.float32(want)]]
    # exp(-log 2) = 0.5, exp(-100) is a subnormal float32, exp(0) = 1.
    decay = call(ROW, a=a, dt_bias=dt_bias, A_log=A_log, output_g_exp=True)[3]
    assert decay.tolist() == [[np.float32(np.exp(want))]]


def test_the_rate_multiplies_g() -> None:
    # exp(1) * log 2.
    assert call(ROW, A_log=1)[3].tolist() == [[np.float32(-np.e * LN2)]]


@pytest.mark.parametrize(
    ("b", "want"), [(0, 0.5), (100, 1), (np.inf, 1), (-np.inf, 0), (-50, np.exp(-50.0)), (1, 1 / (1 + np.exp(-1.0)))]
)
def test_beta(b: float, want: float) -> None:
    assert call(ROW, b=b)[4].tolist() == [[np.float32(want)]]


def test_nan_fills_its_head_of_q_or_k_and_only_itself_in_v() -> None:
    q, k, v, g, beta = call(rows([1, np.nan, 0, 3, -2, 1, np.nan, -5], [1, 1, 0, 3, -2, 1, 7, -5]), l2norm_eps=2.0)
    assert np.isnan(q[0]).all()
    assert k[0].tolist() == [[0.75, -0.5, 0.25]]
    assert np.isnan(v[0, 0, 0])
    assert v[0, 0, 1] == -5
    assert q[1].tolist() == [[0.5, 0.5, 0]]
    assert not np.isnan(g).any()
    assert not np.isnan(beta).any()
    assert np.isnan(call(ROW, a=np.nan)[3]).all()
    assert np.isnan(call(ROW, b=np.nan)[4]).all()


def test_a_sum_of_squares_beyond_float32_is_infinite() -> None:
    # 2**64 squared is 2**128, past the largest float32: finite elements become 0. Infinity times 0 is NaN.
    q, k, _, _, _ = call(rows([2.0**64, 1, 0, np.inf, 1, 0, 0, 0]))
    assert q.tolist() == [[[0, 0, 0]]]
    np.testing.assert_array_equal(k, [[[np.nan, 0, 0]]])


def test_a_zero_vector_gives_zero() -> None:
    q, k, _, _, _ = call(rows([0.0] * 8))
    assert q.tolist() == k.tolist() == [[[0, 0, 0]]]


def test_no_rows() -> None:
    results = call(np.zeros((0, 8), np.float32))
    assert [part.shape for part in results] == [(0, 1, 3), (0, 1, 3), (0, 1, 2), (0, 1), (0, 1)]


def test_any_strides_are_the_same_numbers() -> None:
    strided = np.asfortranarray(np.tile(ROW, (3, 1)))
    assert call(strided, l2norm_eps=2.0)[1].tolist() == [[[0.75, -0.5, 0.25]]] * 3


def test_the_interval_of_the_norm() -> None:
    # K = 4: sqrt(4) / 2 + 6 = 7 roundings of the result. 1 + 1 + eps = 4, so that an input's flush counts 1/2.
    row = rows([1, -1, 0, 0, 1, 1, 1, 1, 7, -5])
    q = call(row, head_k_dim=4, l2norm_eps=2.0, intervals=True)["q"]
    assert q.value.tolist() == [[[0.5, -0.5, 0, 0]]]
    allowed = 7 * ULP * 0.5 + 1.5 * FLUSH
    assert q.high.tolist() == [[[0.5 + allowed, -0.5 + allowed, 1.5 * FLUSH, 1.5 * FLUSH]]]
    assert q.low.tolist() == [[[0.5 - allowed, -0.5 - allowed, -1.5 * FLUSH, -1.5 * FLUSH]]]


def test_the_interval_of_a_copy_is_a_point_with_its_sign() -> None:
    found = call(rows([0, -0.0, 1, 0, 0, 0, -0.0, 2]), l2norm=False, intervals=True)
    for name in ("q", "k", "v"):
        exact = found[name]
        assert exact.bits
        assert exact.low.tobytes() == exact.value.tobytes() == exact.high.tobytes()


@pytest.mark.parametrize(
    ("a", "A_log", "magnitude", "flushes"),
    [
        (0, 0, LN2, 2),  # |g| * (1 + 0 + 0)
        (100, 0, 100, 2),  # above 0, a rounding of x is one of g
        (-64, 0, np.log1p(np.exp(-64.0)) * (1 + 64), 2),  # below 0 an exponential magnifies that of x
        (100, 1, np.e * 100 * (1 + 1), 1 + np.e),  # and that of A_log; a flushed softplus is magnified by exp(A_log)
        (-np.inf, 0, 0, 2),
    ],
)
def test_the_interval_of_g(a: float, A_log: float, magnitude: float, flushes: float) -> None:
    g = call(ROW, a=a, A_log=A_log, intervals=True)["g"]
    allowed = 8 * ULP * magnitude + flushes * FLUSH
    assert g.high.tolist() == (g.value + allowed).tolist()
    assert g.low.tolist() == (g.value - allowed).tolist()


def test_the_interval_of_the_decay() -> None:
    # g = -100 with 8 roundings of 100 and two flushes: exp turns them into a relative error, and has its own 8 of
    # 1 + |g|. A decay of 1 has neither error of g nor |g|.
    decay = call(ROW, a=100, output_g_exp=True, intervals=True)["g"]
    spread = np.expm1(8 * ULP * 100 + 2 * FLUSH) + 8 * ULP * 101
    assert decay.high.tolist() == [[np.exp(-100.0) + (np.exp(-100.0) * spread + FLUSH)]]
    one = call(ROW, a=-np.inf, output_g_exp=True, intervals=True)["g"]
    assert one.high.tolist() == [[1 + 8 * ULP]]
    zero = call(ROW, a=1000, output_g_exp=True, intervals=True)["g"]
    assert (zero.low.tolist(), zero.high.tolist()) == ([[-FLUSH]], [[FLUSH]])


@pytest.mark.parametrize(("b", "beta"), [(0, 0.5), (64, 1), (-np.inf, 0), (-8, 1 / (1 + np.exp(8.0)))])
def test_the_interval_of_beta(b: float, beta: float) -> None:
    exact = call(ROW, b=b, intervals=True)["beta"]
    allowed = 6 * ULP * beta * (1 + abs(b)) + FLUSH if beta else FLUSH
    assert exact.value.tolist() == pytest.approx(np.array([[beta]]), rel=1e-15)
    np.testing.assert_allclose(exact.high - exact.value, allowed, rtol=1e-8)
    np.testing.assert_allclose(exact.value - exact.low, allowed, rtol=1e-8)
