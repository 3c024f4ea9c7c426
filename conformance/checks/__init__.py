"""The checks of a case on a backend: a module each, found by its file.

A module says in `PROVES`, one sentence for the reports, what its check shows, and defines `check(attempt)`, which gives
one line for each thing that is wrong.
"""

import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Protocol, cast

from polyfuse.conformance.attempt import Attempt


class Check(Protocol):
    """What a module of this package defines."""

    PROVES: str

    def check(self, attempt: Attempt) -> Iterator[str]:
        """What is wrong, a line each."""
        ...


@cache
def checks() -> dict[str, Check]:
    """The checks by name: the values first, as the others take them to be right."""
    names = sorted((m.name for m in pkgutil.iter_modules(__path__)), key=lambda name: (name != "values", name))
    return {name: cast(Check, import_module(f"{__name__}.{name}")) for name in names}
