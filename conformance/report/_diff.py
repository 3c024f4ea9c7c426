"""Two reports compared: what is worse in the second one, what is better, and what else is not the same."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from polyfuse.conformance.report._report import Report
from polyfuse.conformance.report._result import Result
from polyfuse.conformance.report._text import words

RANK = ("failed", "not run", "partial", "conformant")
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Difference:
    """From one report to the next, a line for each difference."""

    regressions: list[str] = field(default_factory=list)
    improvements: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if nothing is worse."""
        return not self.regressions


def compare(before: Report, after: Report) -> Difference:
    """What differs between two reports.

    It is a regression if a verdict is lower, a case that passed does not pass or is not there, a failure that was
    waived is one now, a case that was skipped fails, or a case that was claimed is not.
    """
    found = Difference(changes=list(_surroundings(before, after)))
    _compare_verdicts(before, after, found)
    old, new = _by_key(before), _by_key(after)
    for key, result in old.items():
        _compare_case(key, result, new.get(key), found)
    for key, result in new.items():
        if key not in old:
            found.new.append(f"{_name(key)}: {_state(result)}")
    return found


def _surroundings(before: Report, after: Report) -> Iterator[str]:
    """What the reports were made with that is not the same."""
    for name in ("device", "level", "seed", "state"):
        yield from _changed(name, getattr(before, name), getattr(after, name))
    yield from _changed("filter", before.filters.get("cases", "none"), after.filters.get("cases", "none"))
    if before.spec_versions and after.spec_versions:  # older files have none
        for op in before.spec_versions.keys() & after.spec_versions.keys():
            yield from _changed(f"spec of {op}", before.spec_versions[op], after.spec_versions[op])
    for name in sorted(before.versions.keys() | after.versions.keys()):
        yield from _changed(name, before.versions.get(name, "none"), after.versions.get(name, "none"))
    for name in sorted(before.backends.keys() & after.backends.keys()):
        yield from _changed(f"backend {name}", before.backends[name].version, after.backends[name].version)


def _changed(name: str, before: object, after: object) -> Iterator[str]:
    if before != after:
        yield f"{name}: {before} -> {after}"


def _compare_verdicts(before: Report, after: Report, found: Difference) -> None:
    after_all = after.verdicts()
    for (op, backend), old in before.verdicts().items():
        new = after_all.get((op, backend))
        if new is None:
            continue  # its cases are missing, each of which is said
        line = f"{op} on {backend}: {old.status} -> {new.status} ({new.why})"
        if RANK.index(new.status) < RANK.index(old.status):
            found.regressions.append(line)
        elif RANK.index(new.status) > RANK.index(old.status):
            found.improvements.append(line)


def _compare_case(key: Key, old: Result, new: Result | None, found: Difference) -> None:
    line = f"{_name(key)}: {_state(old)} -> {_state(new) if new else 'missing'}"
    if new is None:
        (found.regressions if old.status == "passed" else found.changes).append(line)
    elif (old.status, old.reason) == (new.status, new.reason):
        return
    elif new.status == "failed" or old.status == "passed" or (_claimed(old) and new.reason == "unclaimed"):
        first = new.detail.strip().partition("\n")[0]
        found.regressions.append(f"{line}: {first}" if first else line)
    elif new.status == "passed":
        found.improvements.append(line)
    else:
        found.changes.append(line)


def _claimed(result: Result) -> bool:
    """Whether the backend is known to claim the case: it was not only left out."""
    return result.status != "skipped"


def _state(result: Result) -> str:
    return words(result.reason or result.ending or result.status)


def _name(key: Key) -> str:
    return "{} on {}, {}".format(*key)


def _by_key(report: Report) -> dict[Key, Result]:
    return {(r.op, r.backend, r.case): r for r in report.results}
