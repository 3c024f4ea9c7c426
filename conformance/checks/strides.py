"""Where the elements of the arguments lie: gaps, orders and repeated elements, of one argument or of all."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any
from zlib import crc32

import numpy as np

from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.checks.values import problems
from polyfuse.conformance.layouts import LAYOUTS
from polyfuse.conformance.other import Inputs

PROVES = (
    "Arguments with gaps between rows or elements, or dimensions in another order, give right values: all of them so "
    "and, on core cases of a backend that is not emulated, each one alone, also expanded from one row or one element "
    "of each row. Where kernels are compiled for each new kind of call, a core case has one of these for an argument."
)

# Every element in memory of its own; what lies between is NaN, or a number that is no index.
APART = ("row_strided", "column_strided", "every_other", "sliced")
EXPANDED = ("expanded", "expanded_last")


def check(attempt: Attempt) -> Iterator[str]:
    """Which layout of which arguments makes a result wrong."""
    if attempt.family == "jax" or not attempt.single or not attempt.thorough:
        return  # JAX's arrays have no strides
    names = [name for name, x in attempt.made.items() if isinstance(x, np.ndarray) and name not in attempt.case.stacked]
    each = attempt.trial.core and not attempt.interpreted  # the cases that cover every pair vary each one's layout too
    for layout in APART:
        laid_out = {name: LAYOUTS[layout](np.array(attempt.made[name])) for name in names if attempt.made[name].ndim}
        found = list(_called(attempt, layout, {**attempt.made, **laid_out}))
        yield from (f"all arguments {text}" for text in found)
        if each and not found:
            for name, x in laid_out.items():
                if layout not in _some(attempt, name, APART):
                    continue
                alone = {other: np.array(attempt.made[other], order="C") for other in names}
                yield from (f"{name} {text}" for text in _called(attempt, layout, {**attempt.made, **alone, name: x}))
    if each:
        floating = [n for n in names if attempt.made[n].dtype.kind not in "iub" and n not in attempt.call.op.updated]
        for name, layout in product(floating, EXPANDED):
            if attempt.made[name].ndim and layout in _some(attempt, name, EXPANDED):
                yield from _expanded(attempt, layout, name)


def _some(attempt: Attempt, name: str, layouts: tuple[str, ...]) -> tuple[str, ...]:
    """The layouts that an argument has alone: all, or where that takes long the one that falls to it in this case."""
    if not attempt.slow:
        return layouts
    return (layouts[crc32(f"{attempt.case.name} {name}".encode()) % len(layouts)],)


def _called(attempt: Attempt, layout: str, values: Mapping[str, Any]) -> Iterator[str]:
    arrays = attempt.place(values)
    results = attempt.results(arrays, attempt.run(arrays))
    yield from (f"{layout}: {problem}" for problem in problems(results, attempt.call, attempt.exact))


def _expanded(attempt: Attempt, layout: str, name: str) -> Iterator[str]:
    """One argument whose rows, or the elements of each of its rows, are one in memory."""
    inputs = Inputs(attempt.call.op, {**attempt.made, name: LAYOUTS[layout](attempt.made[name])})
    arrays = attempt.place(inputs.made)
    results = attempt.results(arrays, attempt.run(arrays))
    yield from (f"{name} {layout}: {problem}" for problem in problems(results, inputs.call, inputs.exact))
