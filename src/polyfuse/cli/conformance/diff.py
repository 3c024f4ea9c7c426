"""`polyfuse conformance diff`."""

import sys
from pathlib import Path

import click

FILE = click.Path(dir_okay=False, path_type=Path)
TITLES = {"regressions": "worse", "improvements": "better", "new": "new", "changes": "changed"}


@click.command()
@click.argument("before", type=FILE)
@click.argument("after", type=FILE)
def command(before: Path, after: Path) -> None:
    """Compare two reports. Exit status 1 if something is worse in the second one, else 0; 2 for a file that is none.

    \b
    Example:
      polyfuse conformance diff last/conformance.json report/conformance.json
    """
    from polyfuse.conformance.report import compare, printable, read

    found = compare(read(before), read(after))
    for name, title in TITLES.items():
        for line in getattr(found, name):
            click.echo(printable(f"{title}: {line}"))
    click.echo(", ".join(f"{len(getattr(found, name))} {title}" for name, title in TITLES.items()))
    sys.exit(0 if found.ok else 1)
