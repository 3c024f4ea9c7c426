"""A conformance run on a terminal, as `polyfuse conformance` does it."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polyfuse.cli._terminal import activity

if TYPE_CHECKING:
    from polyfuse.conformance import Report, Result

INTERRUPTED = 130  # what shells say of a command that Ctrl-C has ended
SAVE_EVERY = 10.0  # seconds
STATUS_STYLE = {"passed": "green", "failed": "bold red", "waived": "magenta", "skipped": "yellow"}
VERDICT_STYLE = {"conformant": "green", "partial": "yellow", "failed": "bold red", "not run": "dim"}


def run_conformance(out: Console, folder: Path | None, **options: Any) -> int:
    """Run conformance with a live progress bar, print what it found, and return the exit status.

    That is 0 if the report is ok, else 1, or `INTERRUPTED`. `options` are those of `polyfuse.conformance.run`; no
    `workers` means as many as fit the device. The report is written into `folder`, if there is one, before the first
    case and as it grows: a run that is killed leaves one that says that it has not ended.
    """
    from polyfuse import conformance as suite
    from polyfuse.conformance.workers import default_count

    if options.get("workers") is None:
        options["workers"] = default_count(options["device"])
    with _terminated_as_interrupted(), activity(out, "conformance") as shown:
        saved = time.monotonic()

        def begin(report: suite.Report) -> None:
            shown.update(done=len(report.results), total=report.planned)
            if folder:
                report.write(folder)

        def show(report: suite.Report, latest: "Result") -> None:
            nonlocal saved
            shown.update(f"{latest.op} {latest.backend}", advance=1)
            if folder and time.monotonic() - saved > SAVE_EVERY:
                saved = time.monotonic()
                report.save(folder)

        report = suite.run(**options, on_start=begin, on_result=show)
        if report.state == "interrupted":
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the report is written
    _print_report(out, report)
    if folder:
        out.print("written: " + ", ".join(map(str, report.write(folder))), soft_wrap=True)
    if report.state == "interrupted":
        return INTERRUPTED
    return 0 if report.ok else 1


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end what runs as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_report(out: Console, report: "Report") -> None:
    """Print the matrix of ops and backends, every failure and waiver, why cases were skipped, verdicts and counts."""
    table = Table(
        "op", *report.backend_names, title=f"Conformance on {report.device}, level {report.level}, seed {report.seed}"
    )
    verdicts = report.verdicts()
    for op in report.ops:
        cells = []
        for name in report.backend_names:
            verdict = verdicts.get((op, name))
            style = VERDICT_STYLE[verdict.status] if verdict else ""
            cells.append(f"[{style}]{verdict.status}[/] {_counts(report.counts(op, name))}" if verdict else "-")
        table.add_row(op, *cells)
    out.print(table)
    for r in report.results:
        if r.status in ("failed", "waived"):
            style = STATUS_STYLE[r.status]
            how = f" ({r.ending.replace('_', ' ')})" if r.ending else ""
            out.print(f"[{style}]{r.status}{how}[/] {r.op} {r.backend} {r.case}: {escape(r.detail)}", soft_wrap=True)
    skipped: dict[tuple[str, str], int] = {}
    for r in report.results:
        if r.status == "skipped":
            skipped[r.backend, r.detail] = skipped.get((r.backend, r.detail), 0) + 1
    for (name, detail), count in sorted(skipped.items()):
        out.print(f"[yellow]skipped[/] {name}: {count} cases: {escape(detail)}", soft_wrap=True)
    for (op, name), verdict in verdicts.items():
        if verdict.status == "partial":
            claimed = f"{verdict.claimed} of {verdict.asked} cases claimed"
            out.print(f"[yellow]partial[/] {op} {name}: {escape(verdict.why)}; {claimed}", soft_wrap=True)
    for name in report.backend_names:
        out.print(f"{name}: {len(report.conformant(name))} of {len(report.ops)} ops conformant")
    counts = report.counts()
    ended = "" if report.complete else f"{report.state}, {len(report.results)} of {report.planned} results: "
    out.print(ended + ", ".join(f"{counts[s]} {s}" for s in STATUS_STYLE))


def _counts(counts: dict[str, int]) -> str:
    return " ".join(f"{counts[s]} {s}" for s in STATUS_STYLE if counts[s])
