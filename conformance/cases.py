"""The conformance cases of an op: its own, those of its plan that cover every pair, and the real shapes of models."""

from collections.abc import Mapping
from functools import cache
from math import prod
from typing import Any

from polyfuse.configs import ModelCase, model_configs
from polyfuse.conformance.case import Case
from polyfuse.conformance.covering import Covering, Item, Row
from polyfuse.conformance.inputs import Described, described
from polyfuse.conformance.ops import suite
from polyfuse.conformance.plan import case_of, factors, label
from polyfuse.conformance.plans import plan
from polyfuse.spec import OPS, SpecError, bind

_SMALL = 2**20  # elements of the arguments of a real shape that the level quick runs
# What a row of the level quick costs in units of a structure to compile: itself, and each so many elements.
_STRUCTURE, _ELEMENTS = 0.5, 2**13


@cache
def cases(op: str) -> tuple[Case, ...]:
    """The op's own cases, those of `conformance.ops.<op>`."""
    return tuple(suite(op).cases())


@cache
def covering(op: str) -> Covering | None:
    """The covering of the op's plan, None without one. What the spec refuses is no case."""
    spec, varied = OPS[op], plan(op)
    if varied is None:
        return None

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
    return tuple(_by_row(op).values())


@cache
def _by_row(op: str) -> dict[Row, Case]:
    found, varied = covering(op), plan(op)
    if found is None or varied is None:
        return {}
    return {
        row: case_of(f"pair-{_name(found, pair)}", OPS[op], varied, found.chosen(row))
        for pair, row in found.rows.items()
    }


def _name(found: Covering, pair: tuple[Item, Item]) -> str:
    return "-".join(f"{name}_{label(value)}" for name, value in map(found.value, pair))


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


def selected_for(op: str, level: str) -> list[tuple[Case, str]]:
    """Every case of an op, with why a level does not run it or an empty text.

    `quick` runs the core cases, the real shapes, and of the covering cases as many as have every value of every factor,
    and every fill and layout of the first array in every dtype of it. `standard` and `full` run all cases: what is too
    large for a level is a matter of its limits.
    """
    if level != "quick":
        return [(case, "") for case in all_cases(op)]
    small = (case for case in model_cases(op) if _elements(op, case) <= _SMALL)
    chosen = {*OPS[op].core, *(case.name for case in (*_first_look(op), *small))}
    reason = "not among the cases of the level quick, which have every value of every factor"
    return [(case, "" if case.name in chosen else reason) for case in all_cases(op)]


def _elements(op: str, case: Case) -> int:
    """The elements of all arguments of a case."""
    return sum(prod(value.shape) for value in described(OPS[op], case).values() if isinstance(value, Described))


@cache
def _first_look(op: str) -> tuple[Case, ...]:
    """Few covering cases, of few structures, with every value of every factor."""
    found = covering(op)
    if found is None:
        return ()
    structures = sum(factor.structure for factor in found.factors)
    first = f"{OPS[op].tensors[0].name}."
    in_every_dtype = {n for n, factor in enumerate(found.factors) if factor.name.startswith(first)}
    offers = {
        row: {*enumerate(row), *((row[0], n, v) for n, v in enumerate(row) if n in in_every_dtype)}
        for row in found.rows.values()
    }
    costs = {row: _STRUCTURE + _elements(op, case) / _ELEMENTS for row, case in _by_row(op).items()}
    wanted = set[tuple[int, ...]]().union(*offers.values())
    kept: dict[Row, None] = {}
    seen: set[Row] = set()
    while wanted:
        row = max(offers, key=lambda row: len(offers[row] & wanted) / (costs[row] + (row[:structures] not in seen)))
        kept[row] = None
        seen.add(row[:structures])
        wanted -= offers[row]
    return tuple(_by_row(op)[row] for row in kept)


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
