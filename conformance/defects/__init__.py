"""Wrong backends: a right one with one planted defect each, which the checks must reject. A module per kind of defect.

`register` adds one. It is made of a right backend's function: `make(right)` gives the function that is wrong.
"""

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any

from polyfuse.conformance.case import Case
from polyfuse.conformance.cases import cases, covering_cases
from polyfuse.spec import OPS

Function = Callable[..., Any]
Make = Callable[[Function], Function]


@dataclass(frozen=True)
class Defect:
    """A wrong implementation of an op: what `make` makes of the function of the built-in `backend`.

    `check` is the one that exists for its kind, and rejects it on one of the `cases`: names of the op's own cases, by
    default its first core case; "core" are all of those, "*" all of them and the covering ones. With `repeat` a case
    repeats its rows so often.
    """

    name: str
    op: str
    check: str
    make: Make
    backend: str = "torch"
    cases: tuple[str, ...] = ()
    repeat: int = 1

    @property
    def chosen(self) -> list[Case]:
        """The cases that show it."""
        core = OPS[self.op].core
        names = core if "core" in self.cases else self.cases or core[:1]
        if "*" in names:
            return [case for case in (*cases(self.op), *covering_cases(self.op)) if case.repeat == 1]
        found = [case for case in cases(self.op) if case.name in names]
        return [replace(case, repeat=self.repeat) if self.repeat > 1 else case for case in found]


_FOUND: list[Defect] = []


def register(
    check: str, *ops: str, backend: str = "torch", cases: Sequence[str] = (), repeat: int = 1
) -> Callable[[Make], Make]:
    """Register a defect of these ops under the name of the function that makes it; `cases` and `repeat` are theirs."""

    def add(make: Make) -> Make:
        for op in ops:
            name = make.__name__ if backend == "torch" else f"{make.__name__}_{backend}"
            _FOUND.append(Defect(name, op, check, make, backend, tuple(cases), repeat))
        return make

    return add


@cache
def defects() -> tuple[Defect, ...]:
    """Every defect of this package's modules."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            import_module(f"{__name__}.{module.name}")
    return tuple(_FOUND)
