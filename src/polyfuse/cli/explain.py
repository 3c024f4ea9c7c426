"""`polyfuse explain`."""

import json

import click
from rich.markup import escape
from rich.table import Table

import polyfuse
from polyfuse.cli._device import chosen_device
from polyfuse.cli._options import family_option
from polyfuse.cli._terminal import console
from polyfuse.spec import OPS, canonical


@click.command()
@click.argument("op")
@family_option
@click.option(
    "--device", default=None, help="Device of the arrays, such as cpu or cuda; the accelerator if there is one."
)
@click.option("--json", "as_json", is_flag=True, help="Print the decision as JSON.")
def command(op: str, family: str, device: str | None, as_json: bool) -> None:
    """Show which backend runs OP here, why each other one does not, and where the preference came from.

    \b
    Example:
      POLYFUSE_BACKEND=triton polyfuse explain pos_embed_interpolate
    """
    from polyfuse.conformance import cases, make_inputs, place

    op = canonical(op)
    device = chosen_device(device, [family])
    spec = OPS[op]
    values = make_inputs(spec, cases(spec.name)[0])
    decision = polyfuse.explain(op, **place(values, family, device))
    if as_json:
        click.echo(json.dumps(decision.as_dict(), indent=1))
        return
    title = f"{op} on {decision.device}, {family} arrays: {decision.winner or 'no backend'}"
    preference = f"preference: {', '.join(decision.preference.names)}  from {decision.preference.source}"
    table = Table("backend", "verdict", "why", title=title, caption=preference)
    for c in decision.candidates:
        table.add_row(c.name, c.status, escape(c.reason), style="bold green" if c.status == "chosen" else "")
    console().print(table)
