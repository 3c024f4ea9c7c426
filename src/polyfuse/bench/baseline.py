"""What a user had before: the fastest untouched variant of a call. Every gain of `bench model` is over it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Comparison:
    """Milliseconds of one call of a whole model, by variant; `call` is a row of it, as `results` has them."""

    call: Mapping[str, Any]
    ms: dict[str, float]

    @property
    def size(self) -> str:
        """The call in words."""
        return size_of(self.call)

    @property
    def before(self) -> str | None:
        """The fastest untouched variant, if one was measured."""
        return min(filter(untouched, self.ms), key=self.ms.__getitem__, default=None)

    def gain(self, variant: str) -> float | None:
        """How many times as fast as the baseline a variant is; None if one of them was not measured."""
        if self.before is None or variant not in self.ms:
            return None
        return self.ms[self.before] / self.ms[variant]


def untouched(variant: str) -> bool:
    """Whether a variant, by its name, is one that a user had before."""
    return variant.startswith("untouched")


def compare(rows: Iterable[Mapping[str, Any]]) -> list[Comparison]:
    """The rows of a whole model, one comparison for each call."""
    found: dict[tuple[Any, ...], Comparison] = {}
    for row in rows:
        key = row["phase"], row["batch"], row["tokens"], row["mode"]
        found.setdefault(key, Comparison(row, {})).ms[row["variant"]] = row["ms"]
    return list(found.values())


def variants_of(rows: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """The variants that rows have: untouched ones, and the others."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    return [name for name in names if untouched(name)], [name for name in names if not untouched(name)]


def size_of(row: Mapping[str, Any]) -> str:
    """The call that a row is of, in words."""
    if row["phase"] == "prefill":
        return f"prefill of {row['tokens']:,} tokens"
    return f"decode of {row['batch']} sequence{'s' if row['batch'] > 1 else ''}"
