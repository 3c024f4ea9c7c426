"""The conformance cases of an op: its own, those of its plan that cover every pair, and the real shapes of models."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from polyfuse.configs import ModelCase, model_configs
from polyfuse.conformance.case import Case
from polyfuse.conformance.covering import Covering
from polyfuse.conformance.inputs import described
from polyfuse.conformance.ops import suite
from polyfuse.conformance.plan import case_of, factors, label
from polyfuse.conformance.plans import plan
from polyfuse.spec import OPS, SpecError, bind


@cache
def cases(op: str) -> tuple[Case, ...]:
    """The op's own cases, those of `conformance.ops.<op>`."""
    return tuple(suite(op).cases())


@cache
def covering(op: str) -> Covering:
    """The covering of the op's plan. What the spec refuses is no case."""
    spec, varied = OPS[op], plan(op)

    def refusal(chosen: Mapping[str, Any]) -> str:
        try:
            bind(spec, described(spec, case_of("", spec, varied, chosen)))
        except SpecError as error:
            return str(error)
        return ""

    return Covering(factors(spec, varied), refusal, varied.needs)


@cache
def covering_cases(op: str) -> tuple[Case, ...]:
    """A case for each row of the op's covering, named after the pair that the row was made for."""
    found = covering(op)
    named = {"-".join(f"{n}_{label(v)}" for n, v in map(found.value, pair)): row for pair, row in found.rows.items()}
    return tuple(case_of(f"pair-{name}", OPS[op], plan(op), found.chosen(row)) for name, row in named.items())


@cache
def model_cases(op: str) -> tuple[Case, ...]:
    """The real shapes of the op in the model files."""
    return tuple(
        model_case(model, shape) for model, config in model_configs().items() for shape in config.ops.get(op, [])
    )


@cache
def all_cases(op: str) -> tuple[Case, ...]:
    """The op's own cases, the covering ones and those of the model files, names unique."""
    found = (*cases(op), *covering_cases(op), *model_cases(op))
    names = [c.name for c in found]
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise ValueError(f"{op}: case names used twice: {', '.join(sorted(twice))}")
    return found


def model_case(model: str, shape: ModelCase) -> Case:
    """One real shape of a model file as a case."""
    return Case(
        f"{model}-{shape.name}",
        {name: tuple(size) if isinstance(size, list) else size for name, size in shape.dims.items()},
        shape.attrs,
        shape.dtypes,
        {name: tuple(tuple(n) if isinstance(n, list) else n for n in rows) for name, rows in shape.host.items()},
        as_tensor=tuple(shape.as_tensor),
        present=tuple(shape.present),
        fill=shape.fill,
    )
