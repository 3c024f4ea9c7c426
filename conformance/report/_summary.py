"""What a report shows first, on a page and as Markdown: what was proven, what was not, and with what it ran."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyfuse.conformance.report._text import number

if TYPE_CHECKING:
    from polyfuse.conformance.report._report import Report

GAPS = {
    "waived": "failed, as the backend has declared in a waiver",
    "left_out": "left out by the level or a filter",
    "too_large": "too large for the level",
    "unclaimed": "not claimed by the backend, which refused them",
    "unavailable": "on a backend that does not have the op, or cannot run here",
    "skipped": "not run for another reason",
}
_ALWAYS = (
    "Other shapes, values and memory layouts than those of the cases.",
    "How fast anything is.",
)


@dataclass(frozen=True)
class Gap:
    """Cases that prove nothing, and why: the number of all, and of each (backend, reason), most first."""

    title: str
    count: int
    reasons: list[tuple[str, str, int]]


def gaps(report: "Report") -> list[Gap]:
    """The cases that neither passed nor failed, by why."""
    found: dict[str, list[tuple[str, str]]] = {}
    for r in report.results:
        if r.status in ("skipped", "waived"):
            found.setdefault(r.reason or r.status, []).append((r.backend, r.detail))
    return [
        Gap(title, len(found[kind]), [(*reason, count) for reason, count in Counter(found[kind]).most_common()])
        for kind, title in GAPS.items()
        if kind in found
    ]


def not_proven(report: "Report") -> list[str]:
    """What no case of the run shows: what the backends claim to be free of, and what is never looked at."""
    claimed = [
        f"{op} on {name}: that a call with {', '.join(claim.host_reads)} does not wait for the device, or can be "
        "captured in a graph. The backend claims to read the values on the host."
        for name, facts in report.backends.items()
        for op, claim in facts.claims.items()
        if claim.host_reads
    ]
    device = report.device.partition(" ")[0].partition(":")[0]
    sampled = [
        f"{name}: what changes with a second call or another layout, beyond the core cases and a sample of the others. "
        f"The backend claims that {how}."
        for name, facts in report.backends.items()
        for how, devices in (
            ("it is emulated", {d for claim in facts.claims.values() for d in claim.interpreted}),
            ("a kernel is compiled for each new kind of call", {d for c in facts.claims.values() for d in c.compiled}),
        )
        if device in devices
    ]
    return [*claimed, *sampled, *_ALWAYS]


def reservations(report: "Report") -> list[str]:
    """Why the run as a whole proves less than its level: sentences, none of a complete run of all cases."""
    found = []
    if report.state == "running":
        found.append("This run has not ended.")
    elif report.state == "interrupted":
        found.append("This run was interrupted.")
    if len(report.results) < report.planned:
        found.append(f"Only {len(report.results):,} of {number(report.planned, 'planned result')} are here.")
    if report.filters.get("cases"):
        found.append(f"A filter chose the cases: {', '.join(report.filters['cases'])}.")
    return found + (["Therefore nothing in it is conformant."] if found else [])


def headline(report: "Report") -> str:
    """The result in one sentence."""
    verdicts = [verdict.status for verdict in report.verdicts().values()]
    tally = Counter(verdicts)
    ran = len(verdicts) - tally["not run"]
    rest = [f"{tally[status]} {status}" for status in ("partial", "failed") if tally[status]]
    counts = report.counts()
    cases = ", ".join(f"{counts[status]:,} {status}" for status in ("passed", "failed", "waived", "skipped"))
    conformant = f"{tally['conformant']} of {number(ran, 'pair')} of op and backend conformant"
    return f"{', '.join([conformant, *rest])}. Cases: {cases}."


def standing(report: "Report") -> str:
    """The verdict on the run as a whole: conformant only if every op that ran is so on every backend."""
    found = {verdict.status for verdict in report.verdicts().values()} - {"not run"}
    if "failed" in found:
        return "failed"
    return "conformant" if found == {"conformant"} else "partial"


def facts(report: "Report") -> dict[str, str]:
    """With what the report was made, as names and texts; those that are unknown are left out."""
    found = {
        "Device": report.device,
        "Chip": report.chip.get("name", ""),
        "Architecture": report.chip.get("arch", ""),
        "Driver": report.chip.get("driver", ""),
        "CUDA": report.chip.get("cuda", ""),
        "ROCm": report.chip.get("rocm", ""),
        "Level": report.level,
        "Seed": str(report.seed),
        "Commit": report.commit or "not known",
        "Started": report.started,
        "Finished": report.finished,
        "Command": report.command,
    }
    return {name: value for name, value in found.items() if value}


def percent(share: float) -> str:
    """A share as a whole percentage that says 0 % and 100 % of nothing else."""
    if 0 < share < 0.01:
        return "<1%"
    return ">99%" if 0.99 < share < 1 else f"{share:.0%}"
