"""Reports of parts of a run, each on some ops and backends, as one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from polyfuse.conformance.report._facts import BackendFacts
from polyfuse.conformance.report._report import Report, State
from polyfuse.spec import fail

# A report has one of each, so that the parts must agree.
SAME = ("device", "level", "proves", "seed", "filters", "commit", "versions", "chip")


def merge(reports: Sequence[Report]) -> Report:
    """One report of all results, in the order of the parts; it is complete if every part is.

    Raises `SpecError` for parts that were not made on the same device, at the same level and commit, with the same
    versions, seed and filters, and for a case that two of them have.
    """
    if not reports:
        fail("merge", "reports", "one or more", "none")
    first = reports[0]
    for other in reports[1:]:
        for name in SAME:
            one, two = getattr(first, name), getattr(other, name)
            if one != two:
                fail("merge", name, f"the same in every report, {_shown(one, two)}", _shown(two, one))
    seen: set[tuple[str, str, str]] = set()
    for result in (result for report in reports for result in report.results):
        key = result.op, result.backend, result.case
        if key in seen:
            fail("merge", "results", "each case once", f"{result.case} of {result.op} on {result.backend} twice")
        seen.add(key)
    return replace(
        first,
        command="\n".join(dict.fromkeys(report.command for report in reports if report.command)),
        started=min(report.started for report in reports),
        finished=max(report.finished for report in reports),
        state=_state(reports),
        backends=_backends(reports),
        checks=_agreed("checks", [report.checks for report in reports]),
        spec_versions=_agreed("spec_versions", [report.spec_versions for report in reports]),
        planned=sum(report.planned for report in reports),
        results=[result for report in reports for result in report.results],
    )


def _state(reports: Sequence[Report]) -> State:
    states: tuple[State, ...] = ("running", "interrupted", "complete")
    return next(state for state in states if any(report.state == state for report in reports))


def _backends(reports: Sequence[Report]) -> dict[str, BackendFacts]:
    """What the parts say of each backend: its claims on all of their ops, and all else, in which they must agree."""
    found: dict[str, BackendFacts] = {}
    for name, facts in ((name, facts) for report in reports for name, facts in report.backends.items()):
        known = found.get(name, facts)
        claims = _agreed(f"backends: {name}: claims", [known.claims, facts.claims])
        if replace(known, claims={}) != replace(facts, claims={}):
            fail("merge", f"backends: {name}", "the same in every report", "two that differ")
        found[name] = replace(known, claims=claims)
    return found


def _agreed(what: str, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The union of mappings. Raises `SpecError` if two give one key different values."""
    found: dict[str, Any] = {}
    for name, value in ((name, value) for part in parts for name, value in part.items()):
        if found.setdefault(name, value) != value:
            fail("merge", f"{what}: {name}", f"the same in every report, {found[name]}", value)
    return found


def _shown(value: object, other: object) -> str:
    """A value, or of two mappings what differs."""
    if not isinstance(value, Mapping) or not isinstance(other, Mapping):
        return repr(value)
    names = sorted(name for name in value.keys() | other.keys() if value.get(name) != other.get(name))
    names = sorted(name for name in value.keys() | other.keys() if value.get(name) != other.get(name))
    return ", ".join(f"{name} {value.get(name)}" for name in names)
