"""`polyfuse info`."""

import traceback
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from polyfuse.cli._device import default_device
from polyfuse.cli._terminal import console
from polyfuse.spec import OPS, BackendError

if TYPE_CHECKING:
    from polyfuse.dispatch import Backend

# Backends that cannot be loaded, each with its traceback, to the ops that it was to run.
Broken = dict[tuple[str, str], list[str]]


@click.command()
def command() -> None:
    """Show the platform and, for every backend, whether it can run here.

    \b
    Example:
      polyfuse info
    """
    from polyfuse.conformance import versions
    from polyfuse.dispatch import registry

    out, device = console(), default_device()
    out.print(f"device: {device}   " + "   ".join(f"{k} {v}" for k, v in versions().items()), soft_wrap=True)
    broken: Broken = {}
    columns: dict[str, list[str]] = {"": ["arrays", "from", *OPS]}
    for name in registry().names():
        try:
            backend = registry().get(name)
        except BackendError:  # one of the registry's problems, which are printed below
            continue
        verdicts = [_verdict(backend, op, device, broken) for op in OPS]
        columns[name] = [backend.family, escape(backend.origin), *verdicts]
    table = Table(*columns, title="Backends")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    out.print(table)
    for name, text in registry().problems:
        out.print(f"[red]backend {escape(name)} cannot be used:[/] {escape(text)}")
    for (name, text), ops in broken.items():
        out.print(f"[red]backend {escape(name)} cannot run {', '.join(ops)}:[/] {escape(text)}")


def _verdict(backend: "Backend", op: str, device: str, broken: Broken) -> str:
    """What the table says of a backend and an op; a backend that cannot be loaded is noted in `broken`."""
    try:
        missing = backend.missing(op)
        if missing is not None:
            code, reason = missing
            return f"[yellow]{'not implemented' if code == 'not_implemented' else escape(reason)}[/]"
        emulated = device in backend.load(op).capability.interpreted
    except BackendError as error:
        text = "".join(traceback.format_exception(error.__cause__ or error))
        broken.setdefault((backend.name, text), []).append(op)
        return "[red]broken, see below[/]"
    return "[green]available[/]" + (", interpreted" if emulated else "")
