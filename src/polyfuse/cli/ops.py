"""`polyfuse ops`."""

import click
from rich.markup import escape
from rich.table import Table

from polyfuse.cli._terminal import console
from polyfuse.spec import OPS, REQUIRED, canonical, op_page


@click.command()
@click.argument("op", required=False)
def command(op: str | None) -> None:
    """List the ops and their options, or print OP's whole definition as Markdown.

    \b
    Example:
      polyfuse ops pos_embed_interpolate
    """
    if op is not None:
        click.echo(op_page(OPS[canonical(op)]), nl=False)
        return
    table = Table("op", "spec", "what it does", "options")
    for spec in OPS.values():
        options = "\n".join(a.name if a.default is REQUIRED else f"{a.name}={a.default!r}" for a in spec.attrs)
        table.add_row(spec.name, f"v{spec.version}", spec.summary, escape(options))
    console().print(table)
