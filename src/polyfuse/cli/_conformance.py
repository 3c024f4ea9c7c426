"""A conformance run on a terminal, as `polyfuse conformance` and `polyfuse demo` do it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polyfuse.cli._terminal import progress

if TYPE_CHECKING:
    from polyfuse.conformance import Report

SAVE_EVERY = 100  # results
STATUS_STYLE = {"passed": "green", "failed": "bold red", "waived": "magenta", "skipped": "yellow"}


def run_conformance(
    out: Console,
    op_names: Sequence[str],
    backends: Sequence[str],
    profile: str,
    device: str,
    folder: Path | None,
) -> bool:
    """Run conformance with a live progress bar, print what it found, and return whether the report is ok.

    No names of ops or backends mean all. The report is written into `folder`, if there is one, as it grows.
    """
    from polyfuse import conformance as suite

    with progress(out) as bar:
        task = bar.add_task("conformance", total=None)

        def show(so_far: suite.Report, total: int) -> None:
            latest = so_far.results[-1]
            bar.update(task, advance=1, total=total, description=f"{latest.op} {latest.backend}")
            if folder and len(so_far.results) % SAVE_EVERY == 0:  # what a killed run leaves behind
                so_far.write(folder)

        report = suite.run(op_names or None, backends or None, profile=profile, device=device, on_result=show)
    _print_report(out, report, profile)
    if folder:
        out.print("written: " + ", ".join(map(str, report.write(folder))), soft_wrap=True)
    return report.ok


def _print_report(out: Console, report: "Report", profile: str) -> None:
    """Print the matrix of ops and backends, every failure and waiver, why cases were skipped, and the counts."""
    names = list(dict.fromkeys(r.backend for r in report.results))
    ran = list(dict.fromkeys(r.op for r in report.results))
    table = Table("op", *names, title=f"Conformance on {report.device}, profile {profile}, seed {report.seed}")
    for op in ran:
        table.add_row(op, *(_cell(report.counts(op, name)) for name in names))
    out.print(table)
    for r in report.results:
        if r.status in ("failed", "waived"):
            style = STATUS_STYLE[r.status]
            out.print(f"[{style}]{r.status}[/] {r.op} {r.backend} {r.case}: {escape(r.detail)}", soft_wrap=True)
    reasons = {(r.backend, r.detail) for r in report.results if r.status == "skipped"}
    for name, reason in sorted(reasons):
        cases = sum(r.backend == name and r.detail == reason for r in report.results)
        out.print(f"[yellow]skipped[/] {name}: {cases} cases: {escape(reason)}", soft_wrap=True)
    for name in names:
        out.print(f"{name}: {len(report.conformant(name))} of {len(ran)} ops conformant")
    counts = report.counts()
    out.print(", ".join(f"{counts[s]} {s}" for s in STATUS_STYLE))


def _cell(counts: dict[str, int]) -> str:
    return " ".join(f"[{style}]{counts[s]} {s}[/]" for s, style in STATUS_STYLE.items() if counts[s]) or "-"
