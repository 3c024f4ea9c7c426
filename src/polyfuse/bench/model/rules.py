"""Which delta rule runs in each variant of a text model."""

from collections.abc import Iterable, Mapping
from functools import partial

from polyfuse.bench.subjects.text import TextModel
from polyfuse.bench.subjects.variants import ACCELERATED_FLA, FLA, PLAIN

Size = tuple[str, int, int]  # phase, sequences and tokens of each


def delta_rules(subject: TextModel, sizes: Iterable[Size], notes: list[str]) -> Mapping[str, Mapping[str, str]]:
    """The name of the delta rule by variant and phase, from a call of a layer for each size.

    It has several names if it depends on the size. A variant whose package fails, or runs none of the calls, is left
    out and noted.
    """
    found: dict[str, dict[str, str]] = {}
    for variant in subject.variants:
        try:
            rules = _rules_of(subject, variant, sizes)
        except Exception as error:
            if variant in PLAIN:
                raise
            notes.append(f"no variant '{variant}': {type(error).__name__}: {first_line(error)}")
            continue
        if variant == ACCELERATED_FLA and not any(f"({FLA}" in name for name in rules.values()):
            notes.append(f"no variant '{variant}': the backend {FLA} takes none of these calls")
            continue
        found[variant] = rules
    return found


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return str(error).partition("\n")[0]


def _rules_of(subject: TextModel, variant: str, sizes: Iterable[Size]) -> dict[str, str]:
    names: dict[str, list[str]] = {}
    with subject.variant(variant):
        for phase, batch, tokens in sizes:
            cache = subject.cache(batch) if phase == "decode" else None
            call = partial(subject.layer, subject.hidden(batch, tokens), cache)
            name = subject.parts.rule_that_runs(phase, call)
            if name not in names.setdefault(phase, []):
                names[phase].append(name)
    return {phase: ", ".join(rules) for phase, rules in names.items()}
