"""Every number that an interval uses is one of the spec's bounds, and every bound of the spec is used."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest

from polyfuse.conformance import cases, make_inputs
from polyfuse.reference import Exact, Oracle, oracle
from polyfuse.spec import FLOATS, FP32_ROUNDOFF, FP32_TINY, OPS, Cost, ErrorBound, OpSpec, OutputSpec, TensorSpec

LARGE = {"steps": 1e6, "flushes": 2.0**126}  # 0.06 of the magnitude, and 1


@contextmanager
def changed(bound: ErrorBound, **numbers: float) -> Iterator[None]:
    """The bound with other numbers for a while."""
    before = {name: getattr(bound, name) for name in numbers}
    for name, number in numbers.items():
        object.__setattr__(bound, name, number)
    try:
        yield
    finally:
        for name, number in before.items():
            object.__setattr__(bound, name, number)


@cache
def own_inputs(op: str) -> list[dict[str, Any]]:
    """The arguments of all of an op's cases."""
    return [make_inputs(OPS[op], case, seed=1) for case in cases(op) if case.repeat == 1]


def moved(before: Mapping[str, Exact], after: Mapping[str, Exact]) -> set[str]:
    """The outputs whose interval is another one."""
    return {
        name
        for name, exact in before.items()
        if exact.low.tobytes() != after[name].low.tobytes() or exact.high.tobytes() != after[name].high.tobytes()
    }


def ignored(tested: Oracle, calls: Iterable[Mapping[str, Any]]) -> list[str]:
    """The numbers of the spec's bounds, as `value.steps` or `value.flushes`, that move no interval in any call.

    The bound of an output must move that output's interval, and that of an intermediate value the interval of some
    output.
    """
    outputs = {output.name for output in tested.spec.outputs}
    waiting = [(bound, field) for bound in tested.spec.errors for field in LARGE]
    waiting = [(bound, field) for bound, field in waiting if field == "steps" or bound.flushes != 0]
    for call in calls:
        before = tested.intervals(**call)
        for bound, field in list(waiting):
            with changed(bound, **{field: LARGE[field]}):
                found = moved(before, tested.intervals(**call))
            if bound.value in found or (found and bound.value not in outputs):
                waiting.remove((bound, field))
        if not waiting:
            break
    return [f"{bound.value}.{field}" for bound, field in waiting]


@pytest.mark.parametrize("op", OPS)
def test_every_bound_moves_the_interval_of_its_value(op: str) -> None:
    assert ignored(oracle(op), own_inputs(op)) == []


@pytest.mark.parametrize("op", OPS)
def test_nothing_but_the_bounds_widens_an_interval(op: str) -> None:
    """Without them it is the exact value, where that is a number and not left open."""
    with ExitStack() as none:
        for bound in OPS[op].errors:
            none.enter_context(changed(bound, steps=0, flushes=0))
        for call in own_inputs(op):
            for name, exact in oracle(op).intervals(**call).items():
                if name == "q" and call.get("quant_dtype") == "float4_e2m1":
                    continue  # a byte of two numbers, whose interval holds 0 of either sign
                numbers = np.isfinite(exact.low) & np.isfinite(exact.high)
                np.testing.assert_array_equal(exact.low[numbers], exact.value[numbers])
                np.testing.assert_array_equal(exact.high[numbers], exact.value[numbers])


def twice(x: Any) -> Any:
    """The formula of a toy op: half as an intermediate value, then four times that, and a copy."""
    return 4 * (x.astype(np.float64) / 2), x.astype(np.float64)


TOY = OpSpec(
    name="toy",
    version=1,
    summary="",
    formula="",
    source="",
    rows="N",
    tensors=(TensorSpec("x", ("N",), FLOATS, "", dtype_var="T"),),
    attrs=(),
    outputs=(OutputSpec("out", ("N",), "T", ""), OutputSpec("same", ("N",), "T", "")),
    errors=(
        ErrorBound("half", 1, "", flushes=1),
        ErrorBound("out", lambda names: names["N"], ""),
        ErrorBound("same", 0, "a copy"),
    ),
    edge_cases=(),
    core=(),
    cost=lambda call: Cost(0, 0, 0),
)
ALL = ["half.steps", "half.flushes", "out.steps", "same.steps"]
CALLS = [{"x": np.array(values, np.float32)} for values in ([0.0], [1.0, 2.0])]


def test_the_bounds_of_a_toy() -> None:
    def bounds(exact: Any, given: Any, error: Any) -> dict[str, Exact]:
        (of_half, flush), (of_out, _) = error("half"), error("out")
        out = exact["out"]
        return {
            "out": Exact.around(out, (of_half + of_out) * np.abs(out) + 4 * flush),
            "same": Exact.copy(exact["same"], error("same")[0]),
        }

    tested = Oracle(TOY, twice, bounds)
    assert ignored(tested, CALLS) == []
    # No interval of zeros shows a relative error; nor does one call show what another one would.
    assert ignored(tested, CALLS[:1]) == ["half.steps", "out.steps", "same.steps"]
    assert TOY.errors[0].error({}) == (FP32_ROUNDOFF, FP32_TINY)
    assert TOY.errors[1].error({"N": 3}) == (3 * FP32_ROUNDOFF, 0)


def test_an_oracle_that_ignores_its_bounds_is_found_out() -> None:
    def constant(exact: Any, given: Any, error: Any) -> dict[str, Exact]:
        return {name: Exact.around(value, 1e-6 * np.abs(value)) for name, value in exact.items()}

    assert ignored(Oracle(TOY, twice, constant), CALLS) == ALL


def test_an_oracle_that_borrows_a_siblings_bound_is_found_out() -> None:
    def borrowed(exact: Any, given: Any, error: Any) -> dict[str, Exact]:
        relative, flush = error("half")
        return {name: Exact.around(value, relative * np.abs(value) + flush) for name, value in exact.items()}

    assert ignored(Oracle(TOY, twice, borrowed), CALLS) == ["out.steps", "same.steps"]


def test_an_output_whose_bound_moves_another_one_is_found_out() -> None:
    def crossed(exact: Any, given: Any, error: Any) -> dict[str, Exact]:
        relative = {"out": error("half")[0] + error("same")[0] + error("half")[1], "same": error("out")[0]}
        return {name: Exact.around(value, relative[name] * np.abs(value)) for name, value in exact.items()}

    assert ignored(Oracle(TOY, twice, crossed), CALLS) == ["out.steps", "same.steps"]
