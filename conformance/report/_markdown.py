"""A report as Markdown, for a pull request or a job's summary."""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from polyfuse.conformance.report._summary import facts, gaps, headline, not_proven, percent, reservations
from polyfuse.conformance.report._text import number, printable

if TYPE_CHECKING:
    from polyfuse.conformance.report._report import Report

MOST = 50  # problems and reasons that are listed; the JSON file has all


def markdown(report: "Report") -> str:
    """The report in short: verdicts, failures, what was not proven, and with what it ran."""
    return "\n".join(_lines(report))


def _lines(report: "Report") -> Iterable[str]:
    yield f"# Conformance on {_safe(report.device)}\n"
    yield f"{_safe(headline(report))}\n"
    for sentence in reservations(report):
        yield f"**{_safe(sentence)}**\n"
    yield "| op | " + " | ".join(map(_safe, report.backend_names)) + " |"
    yield "|---" * (1 + len(report.backend_names)) + "|"
    for op in report.ops:
        yield f"| {_safe(op)} | " + " | ".join(_cell(report, op, name) for name in report.backend_names) + " |"
    yield "\nA percentage is the share of the cases asked about that the backend claims."
    yield from _section("Failed", [_problem(report, "failed")])
    yield from _section("Waived", [_problem(report, "waived")])
    yield from _section("What was proven", [_bullets(_proven(report))])
    yield from _section("What was not", [_bullets(_not_proven(report))])
    yield from _section("With", [_bullets(f"{name}: {_safe(value)}" for name, value in _with(report).items())])


def _section(title: str, parts: Sequence[str]) -> Iterable[str]:
    if any(parts):
        yield f"\n## {title}\n"
        yield from parts


def _cell(report: "Report", op: str, backend: str) -> str:
    verdict, counts = report.verdict(op, backend), report.counts(op, backend)
    if not verdict.asked and not sum(counts.values()):
        return "-"
    tally = ", ".join(f"{counts[status]} {status}" for status in ("passed", "failed", "waived") if counts[status])
    share = f"; {percent(verdict.share)} claimed" if verdict.status != "not run" else f": {_safe(verdict.why)}"
    return f"**{verdict.status}**{share}" + (f"; {tally}" if tally else "")


def _problem(report: "Report", status: str) -> str:
    found = [r for r in report.results if r.status == status]
    lines = []
    for r in found[:MOST]:
        text = " ".join(filter(None, (r.ending.replace("_", " "), r.detail.strip().partition("\n")[0])))
        lines.append(f"{_safe(r.op)} on {_safe(r.backend)}, {_safe(r.case)}: {_safe(text)}")
    return _bullets(lines + ([f"and {number(len(found) - MOST, 'other')}"] if len(found) > MOST else []))


def _proven(report: "Report") -> Iterable[str]:
    if report.proves:
        yield f"Level {_safe(report.level)}: {_safe(report.proves)}"
    for name, proves in report.checks.items():
        yield f"{_safe(name)}: {_safe(proves)}"


def _not_proven(report: "Report") -> Iterable[str]:
    for gap in gaps(report):
        yield f"{number(gap.count, 'case')} {gap.title}"
        for backend, detail, count in gap.reasons[:MOST]:
            yield f"  {_safe(backend)}, {number(count, 'case')}: {_safe(detail)}"
    yield from map(_safe, not_proven(report))


def _with(report: "Report") -> dict[str, str]:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    specs = ", ".join(f"{op} {version}" for op, version in report.spec_versions.items())
    return {**facts(report), "Versions": versions, **({"Specs": specs} if specs else {})}


def _bullets(lines: Iterable[str]) -> str:
    """The lines as a list, those that begin with spaces one level further in."""
    return "\n".join(f"{line[: len(line) - len(line.lstrip())]}- {line.lstrip()}" for line in lines)


def _safe(text: str) -> str:
    """Text on one line, in which nothing is markup."""
    return re.sub(r"([\\`*\[\]<>|~&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(printable(text).split()))
