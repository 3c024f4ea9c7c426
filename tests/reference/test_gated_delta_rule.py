"""The oracle of `gated_delta_rule`: values worked out by hand, what it grants, and what it leaves undefined."""

from collections.abc import Iterator
from itertools import product
from math import exp, inf, log, nan
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import polyfuse.reference.gated_delta_rule as module
from polyfuse.conformance import Case, make_inputs
from polyfuse.conformance.ops._gated_delta_rule_mutants import chunked, to_bits
from polyfuse.reference import Exact, oracle
from polyfuse.reference._numerics import F64
from polyfuse.spec import OPS
from polyfuse.spec.gated_delta_rule import NAME

BITS = {"bfloat16": 8, "float16": 11, "float32": 24}
HALF = log(0.5)


def numbers(*values: float) -> Any:
    """One row each, of one head of one column."""
    return np.array(values, np.float32)[:, None, None]


def gates(*values: float) -> Any:
    return np.array(values, np.float32)[:, None]


def scalar(**changes: Any) -> dict[str, Any]:
    """Two rows with K = V = 1: S = 2, 1 and then 4; then 4, 2 and then 1."""
    given = {"q": numbers(3, 5), "k": numbers(1, -2), "v": numbers(7, -1), "g": gates(HALF, HALF)}
    given |= {"beta": gates(0.5, 0.5), "initial_state": np.full((1, 1, 1, 1), 2, np.float32)}
    return given | {"output_final_state": True} | changes


def test_a_state_of_one_number() -> None:
    """S = 2 -> 1, d = 0.5 * (7 - 1) = 3, S = 4; S = 4 -> 2, d = 0.5 * (-1 + 4) = 1.5, S = 2 - 3 = -1."""
    o, state = oracle(NAME)(**scalar())
    np.testing.assert_allclose(o.ravel(), [12, -5], rtol=1e-6)
    np.testing.assert_allclose(state.ravel(), [-1], rtol=1e-6)


def test_the_scale() -> None:
    np.testing.assert_allclose(oracle(NAME)(**scalar(scale=0.25))[0].ravel(), [3, -1.25], rtol=1e-6)
    q = np.ones((1, 1, 4), np.float32)
    v, one = np.ones((1, 1, 1), np.float32), np.ones((1, 1), np.float32)
    o, _ = oracle(NAME)(q, q / 4, v, 0 * one, one)
    np.testing.assert_array_equal(o, [[[0.5]]])  # q . k = 1, times 1 / sqrt(4)


def test_without_a_state_the_first_row_gives_its_value() -> None:
    o, state = oracle(NAME)(**scalar(initial_state=None, output_final_state=False))
    np.testing.assert_array_equal(o[0], [[10.5]])  # 3 * 0.5 * 7
    assert state.shape == (0, 1, 1, 1)


def test_columns_and_directions() -> None:
    """A key of the first direction replaces what the state holds there, and leaves the second one alone."""
    q, k = np.array([[[1, 1]]], np.float32), np.array([[[1, 0]]], np.float32)
    v, one = np.array([[[10, 20, 30]]], np.float32), np.ones((1, 1), np.float32)
    before = np.array([[[[1, 2, 3], [4, 5, 6]]]], np.float32)
    o, state = oracle(NAME)(q, k, v, 0 * one, one, initial_state=before, output_final_state=True, scale=1.0)
    np.testing.assert_array_equal(state[0, 0], [[10, 20, 30], [4, 5, 6]])
    np.testing.assert_array_equal(o[0, 0], [14, 25, 36])


def test_value_heads_read_their_key_head() -> None:
    k = np.array([[[1], [10]]], np.float32)
    v, one = np.ones((1, 4, 1), np.float32), np.ones((1, 4), np.float32)
    _, state = oracle(NAME)(k, k, v, 0 * one, one, output_final_state=True)
    np.testing.assert_array_equal(state.ravel(), [1, 1, 10, 10])


def test_packed_sequences() -> None:
    """A row before the first sequence, one of two rows, an empty one, one of one row, and a row past the last."""
    given = scalar(q=numbers(nan, 3, 5, 1, nan), k=numbers(nan, 1, -2, 1, inf), v=numbers(nan, 7, -1, 8, 1))
    given |= {"g": gates(nan, HALF, HALF, HALF, 1), "beta": gates(nan, 0.5, 0.5, 1, 1)}
    given |= {"initial_state": np.array([2, 9, 6], np.float32).reshape(3, 1, 1, 1)}
    given |= {"cu_seqlens": np.array([1, 3, 3, 4])}
    o, state = oracle(NAME)(**given)
    np.testing.assert_allclose(o.ravel(), [0, 12, -5, 8, 0], rtol=1e-6)
    np.testing.assert_allclose(state.ravel(), [-1, 9, 8], rtol=1e-6)
    exact = oracle(NAME).intervals(**given)
    assert exact["o"].low[[0, 4]].max() == exact["o"].high[[0, 4]].min() == 0
    assert exact["final_state"].low[1] == exact["final_state"].high[1] == 9


@pytest.mark.parametrize("g", [-inf, -1e30, -1000.0])
def test_a_reset(g: float) -> None:
    given = scalar(g=gates(HALF, g))
    o, state = oracle(NAME)(**given)
    np.testing.assert_allclose(o.ravel(), [12, 5], rtol=1e-6)  # d = 0.5 * -1, S = 1
    assert state.ravel() == 1
    exact = oracle(NAME).intervals(**given)["o"]
    assert (exact.high - exact.low < 2e-3).all()


def random(seed: int, dtype: str, g: str, beta: str, k: str, rows: int, width: tuple[int, int]) -> dict[str, Any]:
    sizes = {"L": rows, "H": 1, "HV": 2, "K": width[0], "V": width[1], "S": 1}
    fill = {"q": "unit", "k": k, "g": g, "beta": beta}
    attrs = {"output_final_state": True}
    case = Case(f"{g}-{beta}-{k}", sizes, attrs, {"T": dtype}, present=("initial_state",), fill=fill)
    return make_inputs(OPS[NAME], case, seed)


def shares(values: dict[str, Any], results: tuple[F64, F64]) -> Iterator[float]:
    """Of each result, the largest error in units of what its interval grants."""
    exact = oracle(NAME).intervals(**values)
    for result, of in zip(results, exact.values(), strict=True):
        granted = (of.high - of.low) / 2
        yield float((np.abs(result - of.value) / np.maximum(granted, 1e-300)).max())


def emulated(values: dict[str, Any], bits: int) -> tuple[F64, F64]:
    """The chunked form with operands of so many bits, not rounded at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "recurrence", chunked(to_bits(bits))(None))
        arguments = dict.fromkeys(("cu_seqlens", "scale")) | values
        results = oracle(NAME).exact(arguments)
    return results["o"], results["final_state"]


GATES = [*product(("zeros", "decay", "mixed", "resets", "strong"), ("gate", "ones", "small")), ("decay", "to_two")]
SIZES = [(65, (16, 16)), (64, (32, 8)), (130, (24, 16)), (200, (16, 24))]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("k", ["unit", "parallel"])
@pytest.mark.parametrize(("g", "beta"), GATES)
def test_an_emulation_with_rounded_operands_is_granted_and_takes_much_of_it(
    g: str, beta: str, k: str, dtype: str
) -> None:
    worst = [0.0, 0.0]
    for seed, (rows, width) in enumerate(SIZES):
        values = random(seed, dtype, g, beta, k, rows, width)
        worst = list(map(max, worst, shares(values, emulated(values, BITS[dtype]))))
    assert max(worst) < 0.9
    assert worst[0] > 0.2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_operands_of_two_bits_fewer_are_not_granted(dtype: str) -> None:
    values = random(0, dtype, "decay", "gate", "unit", 130, (16, 16))
    assert max(shares(values, emulated(values, BITS[dtype] - 2))) > 1


def in_float32(values: dict[str, Any]) -> tuple[F64, F64]:
    """The recurrence in float32."""
    q, k, v = (np.asarray(values[name], np.float32) for name in "qkv")
    q, k = (np.repeat(part, v.shape[1] // q.shape[1], axis=1) for part in (q, k))
    state, o = values["initial_state"][0], np.empty(v.shape, np.float32)
    for t in range(len(q)):
        state = np.exp(values["g"][t])[:, None, None] * state
        d = values["beta"][t][:, None] * (v[t] - np.einsum("hk,hkv->hv", k[t], state))
        state = state + k[t][:, :, None] * d[:, None, :]
        o[t] = np.float32(q.shape[-1] ** -0.5) * np.einsum("hk,hkv->hv", q[t], state)
    return o, state[None]


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.02), ("float16", 0.05), ("float32", 0.5)])
@pytest.mark.parametrize(("g", "beta"), GATES)
def test_a_recurrence_in_float32_sits_far_inside(g: str, beta: str, dtype: str, most: float) -> None:
    for seed, (rows, width) in enumerate(SIZES):
        values = random(seed, dtype, g, beta, "unit", rows, width)
        assert max(shares(values, in_float32(values))) < most


def test_a_state_that_only_decays_is_granted_no_operand() -> None:
    """Nothing reads it: the interval of bfloat16 is that of float32."""
    values = random(0, "bfloat16", "decay", "zeros", "unit", 130, (16, 16))
    exact = oracle(NAME).intervals(**values)["final_state"]
    wide = oracle(NAME).intervals(**values | {name: values[name].astype(np.float32) for name in "qkv"})["final_state"]
    np.testing.assert_allclose(exact.high - exact.low, wide.high - wide.low, rtol=1e-6)
    large = np.abs(exact.value) > 0.1
    assert ((exact.high - exact.low)[large] < 2.0**-13 * np.abs(exact.value[large])).all()


ROWS = 70
BAD = 40  # a row of the first chunk


def spoiled(name: str, value: float, where: Any) -> dict[str, Exact]:
    values = random(3, "bfloat16", "decay", "gate", "unit", ROWS, (8, 4))
    changed = values[name].copy()
    changed[where] = value
    return oracle(NAME).intervals(**values | {name: changed})


def place(name: str, row: int) -> tuple[Any, Any]:
    """An element of that row, and the value heads and columns [HV, V] that depend on it."""
    touched = np.zeros((2, 4), bool)
    reach: dict[str, Any] = {"k": slice(None), "v": (1, 2), "g": 1, "beta": 1}
    touched[reach[name]] = True
    return {"k": (row, 0, 2), "v": (row, 1, 2), "g": (row, 1), "beta": (row, 1)}[name], touched


def anything(exact: Exact) -> Any:
    return np.isneginf(exact.low) & np.isposinf(exact.high)


@pytest.mark.parametrize("name", ["k", "v", "g", "beta"])
def test_a_nan_is_a_nan_from_its_row_on_and_leaves_its_chunk_undefined(name: str) -> None:
    where, touched = place(name, BAD)
    exact = spoiled(name, nan, where)
    o, state = exact["o"], exact["final_state"]
    assert np.isnan(o.value[BAD:, touched]).all()
    assert not anything(o)[BAD:].any()
    assert anything(o)[:BAD, touched].all()
    assert np.isfinite(o.low[:, ~touched]).all()
    assert np.isnan(state.value.swapaxes(2, 3)[0, touched]).all()
    assert not anything(state).any()
    assert np.isfinite(state.low.swapaxes(2, 3)[0, ~touched]).all()


@pytest.mark.parametrize("name", ["k", "v", "g", "beta"])
def test_what_depends_on_an_infinity_is_undefined(name: str) -> None:
    where, touched = place(name, 65)
    exact = spoiled(name, inf, where)
    o, state = exact["o"], exact["final_state"]
    assert np.isfinite(o.low[:64]).all()
    assert anything(o)[64:, touched].all()
    assert np.isfinite(o.low[:, ~touched]).all()
    assert anything(state).swapaxes(2, 3)[0, touched].all()
    assert np.isfinite(state.low.swapaxes(2, 3)[0, ~touched]).all()


def test_a_nan_or_an_infinity_in_q_stays_in_its_row() -> None:
    o = spoiled("q", nan, (BAD, 0, 2))["o"]
    assert np.isnan(o.value[BAD]).all()
    assert np.isfinite(np.delete(o.low, BAD, 0)).all()
    o = spoiled("q", inf, (BAD, 0, 2))["o"]
    assert anything(o)[BAD].all()
    assert np.isfinite(np.delete(o.low, BAD, 0)).all()


@pytest.mark.parametrize("value", [nan, inf])
def test_the_initial_state_spoils_its_column(value: float) -> None:
    exact = spoiled("initial_state", value, (0, 1, 3, 2))["o"]
    touched = np.zeros((2, 4), bool)
    touched[1, 2] = True
    bad = np.isnan(exact.value) if np.isnan(value) else anything(exact)
    assert bad[:, touched].all()
    assert np.isfinite(exact.low[:, ~touched]).all()


def test_operands_beyond_float16_are_undefined() -> None:
    v = np.full((1, 1, 1), 60000, np.float16)
    one, gate = np.ones((1, 1, 1), np.float16), np.ones((1, 1), np.float32)
    assert not anything(oracle(NAME).intervals(one, one, v, 0 * gate, gate)["o"]).any()
    assert anything(oracle(NAME).intervals(one, one, v, 0 * gate, 2 * gate)["o"]).all()
    wide = [x.astype(ml_dtypes.bfloat16) for x in (one, one, v)]
    assert not anything(oracle(NAME).intervals(*wide, 0 * gate, 2 * gate)["o"]).any()


def test_flushed_numbers_are_granted() -> None:
    exact = oracle(NAME).intervals(**scalar(v=numbers(1e-44, 0), initial_state=None))
    assert exact["o"].low[0, 0, 0] <= 0
    assert exact["final_state"].low[0, 0, 0, 0] <= 0 <= exact["final_state"].high[0, 0, 0, 0] < 1e-36


def test_the_error_of_a_decay_grows_with_the_sum_of_g() -> None:
    """2^-24 * |g|, three times, of what the decay leaves: beside 8 roundings of sums and of the state."""

    def share(g: float) -> float:
        given = scalar(g=gates(g, 0), beta=gates(0, 0), initial_state=np.full((1, 1, 1, 1), exp(-g), np.float32))
        exact = oracle(NAME).intervals(**given)["final_state"]
        return float((exact.high - exact.low)[0, 0, 0, 0] / 2 / exact.value[0, 0, 0, 0]) * 2.0**24

    assert share(-0.001) == pytest.approx(3 * (8**2 + 16**2 + 8**2) ** 0.5, rel=1e-3)
    assert share(-40.0) == pytest.approx(3 * (8**2 + 56**2 + 8**2) ** 0.5, rel=1e-3)
