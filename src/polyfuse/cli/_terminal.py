"""The terminal that commands print to, and how a command that takes long says that it is at work."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

SILENCE = 10.0  # seconds: where no bar can move, a command at work prints a line at least as often


def console() -> Console:
    """The console on stdout, wide enough for tables when it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


class Activity:
    """What a command is doing, and how many of how many are done, if it counts them."""

    def __init__(self, what: str, total: int | None, bar: Progress | None) -> None:
        self.what, self.done, self.total, self.bar = what, 0, total, bar
        self.lock = threading.Lock()  # a soak's threads count together
        self.task = bar.add_task("", total=total, count="") if bar else None
        self.update()

    def update(
        self, what: str | None = None, *, advance: int = 0, done: int | None = None, total: int | None = None
    ) -> None:
        """Change what is given, and show it where a bar can move."""
        with self.lock:
            self.what = what or self.what
            self.done = (self.done if done is None else done) + advance
            self.total = total or self.total
            if self.bar and self.task is not None:
                self.bar.update(
                    self.task, description=escape(self.what), completed=self.done, total=self.total, count=self.count
                )

    @property
    def count(self) -> str:
        """`3/10`, or nothing if it is not known how many there are."""
        return f"{self.done}/{self.total}" if self.total else ""


@contextmanager
def activity(out: Console, what: str, total: int | None = None) -> Iterator[Activity]:
    """Show that a command is at work until the block ends, on a terminal or in a log.

    A terminal has a bar with the count and the time, which disappears at the end. Elsewhere a line on stderr says the
    same every `SILENCE` seconds, so that neither a person nor a job's watchdog takes the command for dead.
    """
    if out.file.isatty() and not out.is_dumb_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[count]}")
        with Progress(*columns, TimeElapsedColumn(), console=out, transient=True) as bar:
            yield Activity(what, total, bar)
        return
    current, ended, started = Activity(what, total, None), threading.Event(), time.monotonic()

    def report() -> None:
        while not ended.wait(SILENCE):
            click.echo(
                f"{time.monotonic() - started:.0f} s: {' '.join([current.what, current.count]).strip()}", err=True
            )

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield current
    finally:
        ended.set()
        reporter.join()
