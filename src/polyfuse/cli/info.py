"""`polyfuse info`."""

import json

import click
from rich import box
from rich.markup import escape
from rich.table import Table

from polyfuse.cli._backends import Verdict, verdicts
from polyfuse.cli._device import default_device
from polyfuse.cli._terminal import console
from polyfuse.spec import OPS

# What the table has room for; every other verdict is said in full below it.
CELLS = {"available": "[green]yes[/]", "interpreted": "[yellow]interpreted[/]", "not_implemented": "-"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, with every reason.")
def command(as_json: bool) -> None:
    """Show the platform and, for every backend, whether it can run here.

    \b
    Example:
      polyfuse info
    """
    from polyfuse.conformance import versions
    from polyfuse.dispatch import registry

    device = default_device()
    found = [(backend, verdicts(backend, device)) for backend in registry().usable()]
    if as_json:
        backends = [
            {
                "name": backend.name,
                "family": backend.family,
                "origin": backend.origin,
                "ops": {op: {"status": v.status, "reason": v.reason} for op, v in ops.items()},
            }
            for backend, ops in found
        ]
        problems = dict(registry().problems)
        click.echo(
            json.dumps({"device": device, "versions": versions(), "backends": backends, "problems": problems}, indent=1)
        )
        return
    out = console()
    out.print(f"device {device}, " + ", ".join(f"{k} {v}" for k, v in versions().items()), width=80)
    table = Table("", *(escape(backend.name) for backend, _ in found), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_row("[dim]arrays[/]", *(f"[dim]{backend.family}[/]" for backend, _ in found))
    for op in OPS:
        table.add_row(op, *(CELLS.get(ops[op].status, "[red]no[/]") for _, ops in found))
    out.print(table)
    reasons = "; no: see below" if any(_grouped(ops) for _, ops in found) else ""
    out.print(f"yes: it runs; interpreted: right, and slow; -: not implemented{reasons}", width=80)
    for backend, ops in found:
        if backend.origin != "built in":
            out.print(f"{escape(backend.name)} is from {escape(backend.origin)}", width=80)
        for verdict, names in _grouped(ops).items():
            kind = "red" if verdict.status == "broken" else "yellow"
            text = f"[{kind}]backend {escape(backend.name)} cannot run {names}:[/] {escape(verdict.reason)}"
            out.print(text, soft_wrap=True)
    for name, text in registry().problems:
        out.print(f"[red]backend {escape(name)} cannot be used:[/] {escape(text)}", soft_wrap=True)


def _grouped(ops: dict[str, Verdict]) -> dict[Verdict, str]:
    """The verdicts that need a sentence, each with the ops that it is on."""
    grouped: dict[Verdict, list[str]] = {}
    for op, verdict in ops.items():
        if verdict.status not in CELLS:
            grouped.setdefault(verdict, []).append(op)
    return {v: "any op" if len(names) == len(OPS) else ", ".join(names) for v, names in grouped.items()}
