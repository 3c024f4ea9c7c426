"""Each bound is tight enough to reject a wrong implementation that a looser one, as it once was, would pass."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest

from polyfuse.conformance import Trial, cases
from polyfuse.conformance.ops import suite
from polyfuse.reference import Exact, gdn_in_proj, oracle, pos_embed_interpolate
from polyfuse.reference._numerics import F64, to_f64
from polyfuse.spec import FP32_ROUNDOFF, FP32_TINY, OPS
from polyfuse.spec.block_quant import FLOAT4, QMAX

# The mutants compare infinities.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

Intervals = dict[str, Exact]
Values = dict[str, Any]


@contextmanager
def steps(op: str, **numbers: Any) -> Iterator[None]:
    """Other numbers of steps in the spec of an op, by the bound's value."""
    bounds = {value: OPS[op].bound(value) for value in numbers}
    before = {value: bound.steps for value, bound in bounds.items()}
    for value, number in numbers.items():
        object.__setattr__(bounds[value], "steps", number)
    try:
        yield
    finally:
        for value, number in before.items():
            object.__setattr__(bounds[value], "steps", number)


def projection(op: str, values: Values) -> Intervals:
    """hidden / 8 + 8 roundings of sum |x * w|, also for sums of integers."""

    def loose(names: Any) -> float:
        return names["hidden"] / 8 + 8

    with ExitStack() as stack:
        stack.enter_context(steps(op, accumulator=0, qkvz=loose, ba=loose))
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(gdn_in_proj, "EXACT_SUMS", 0.0)
        return oracle(op).intervals(**values)


def norm(op: str, values: Values) -> Intervals:
    """K / 2 + 6 roundings of q and of k."""

    def loose(names: Any) -> float:
        return names["head_k_dim"] / 2 + 6 if names["l2norm"] else 0

    with steps(op, q=loose, k=loose):
        return oracle(op).intervals(**values)


def rows(op: str, values: Values) -> Intervals:
    """V / 2 + 10 roundings of y."""
    with steps(op, y=lambda names: names["V"] / 2 + 10):
        return oracle(op).intervals(**values)


def decay(op: str, values: Values) -> Intervals:
    """g's magnitude is |g| * (1 + |x| + |A_log|), above 0 too, and a flush counts once."""
    found = oracle(op).intervals(**values)
    a = to_f64(values["a"]).reshape(found["g"].value.shape)
    x, rate = a + to_f64(values["dt_bias"]), to_f64(values["A_log"])
    with np.errstate(all="ignore"):
        g: F64 = -np.exp(rate) * (np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))
        relative = 8 * FP32_ROUNDOFF * np.abs(g) * (1 + np.abs(x) + np.abs(rate))
        error = np.where(g == 0, 0.0, relative) + FP32_TINY
        if values["output_g_exp"]:
            spread = np.expm1(error) + 8 * FP32_ROUNDOFF * (1 + np.abs(g))
            g = np.exp(g)
            error = np.where(g == 0, 0.0, g * spread) + FP32_TINY
    return found | {"g": Exact.around(g, error)}


def division(op: str, values: Values) -> Intervals:
    """q has 3 roundings of the division also where y is exact and the scale a power of two."""
    found = oracle(op).intervals(**values)
    q, qmax = found["q"], QMAX[values["quant_dtype"]]
    point, slack = q.low == q.high, 3 * FP32_ROUNDOFF * np.abs(q.value)
    low = np.where(point, np.clip(q.value - slack, -qmax, qmax), q.low)
    high = np.where(point, np.clip(q.value + slack, -qmax, qmax), q.high)
    return found | {"q": Exact(q.value, low, high, parts=q.parts)}


def zeros(op: str, values: Values) -> Intervals:
    """Any positive number of four bits where q is 0."""
    found = oracle(op).intervals(**values)
    q = found["q"]
    if values["quant_dtype"] != FLOAT4:
        return found
    return found | {"q": Exact(q.value, q.low, np.where(q.value == 0, np.maximum(q.high, 6), q.high), parts=q.parts)}


def grid_points(op: str, values: Values) -> Intervals:
    """The roundings of an interpolation at grid points too, as if every number there might be flushed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pos_embed_interpolate, "may_flush", lambda value: (value != 0) & np.isfinite(value))
        return oracle(op).intervals(**values)


LOOSE: list[tuple[str, str, Callable[[str, Values], Intervals], str]] = [
    ("gdn_in_proj", "accumulator_of_22_bits", projection, "qkvz"),
    ("gdn_in_proj", "ties_away", projection, "qkvz"),
    ("gdn_post_conv", "approximate_root", norm, "q"),
    ("gdn_conv_prep", "truncated_sum_of_squares", norm, "q"),
    ("gated_rms_norm", "truncated_sum_of_squares", rows, "y"),
    ("gdn_post_conv", "early_threshold", decay, "g"),
    ("gdn_conv_prep", "early_threshold", decay, "g"),
    ("silu_mul_block_quant", "ties_away", division, "q"),
    ("block_quant", "four_bits_nan_saturates", zeros, "q"),
    ("pos_embed_interpolate", "ties_away", grid_points, "out"),
]


@pytest.mark.parametrize(("op", "mutant", "loose", "output"), LOOSE, ids=[f"{op}-{name}" for op, name, *_ in LOOSE])
def test_a_mutant_between_the_loose_bound_and_todays(
    op: str, mutant: str, loose: Callable[[str, Values], Intervals], output: str
) -> None:
    wrong = suite(op).MUTANTS[mutant]
    rejected = []
    for case in cases(op):
        if case.repeat > 1:
            continue
        trial = Trial(op, case, seed=1)
        values, call = trial.inputs()
        result = wrong(**values)
        problem = trial.check(result, call)
        rejected += [problem] if problem else []
        once = Trial(op, case, seed=1)
        once._exact = loose(op, values)
        assert once.check(result, call) is None
    assert rejected
    assert rejected[0].startswith(f"{output}: ")


@pytest.mark.parametrize(("op", "loose"), sorted({(op, loose) for op, _, loose, _ in LOOSE}, key=str))
def test_the_loose_bounds_contain_todays(op: str, loose: Callable[[str, Values], Intervals]) -> None:
    """But for the flush of g, which is wider today."""
    for case in cases(op):
        if case.repeat > 1:
            continue
        values = Trial(op, case, seed=1).inputs()[0]
        was = loose(op, values)
        for name, exact in oracle(op).intervals(**values).items():
            known = np.isfinite(exact.low) & np.isfinite(exact.high)
            flush = 16 * FP32_TINY * np.exp(3.0) if name == "g" else 0.0
            assert (was[name].low[known] - flush <= exact.low[known]).all(), (case.name, name)
            assert (was[name].high[known] + flush >= exact.high[known]).all(), (case.name, name)
