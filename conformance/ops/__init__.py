"""What conformance knows of each op: a module per op with its cases, fills and wrong implementations."""

from collections.abc import Iterable
from importlib import import_module
from typing import Protocol, cast

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill
from polyfuse.conformance.mutations import Mutant


class Suite(Protocol):
    """What the module of an op defines.

    `FILLS` are the value distributions that its cases alone use, by name. `MUTANTS` are wrong implementations, by name:
    each takes the op's parameters and returns what the op would, and at least one case must reject it.
    """

    FILLS: dict[str, Fill]
    MUTANTS: dict[str, Mutant]

    def cases(self) -> Iterable[Case]:
        """The op's conformance cases."""
        ...


def suite(op: str) -> Suite:
    """The conformance suite of an op, by the op's name."""
    return cast(Suite, import_module(f"polyfuse.conformance.ops.{op}"))
