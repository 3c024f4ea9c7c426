"""`polyfuse matrix`."""

import json
from dataclasses import asdict

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(as_json: bool) -> None:
    """Print what every backend claims to run, as a Markdown table. Conformance tests the claims both ways.

    \b
    Example:
      polyfuse matrix --json
    """
    from polyfuse.dispatch._matrix import as_markdown, support_matrix

    rows = support_matrix()
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        click.echo(as_markdown(rows), nl=False)
