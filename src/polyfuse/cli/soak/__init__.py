"""`polyfuse soak`."""

import click

from polyfuse.cli._group import ModuleGroup


@click.group(cls=ModuleGroup, package=__name__)
def command() -> None:
    """Run random work for long, and compare every result.

    \b
    Example:
      polyfuse soak encoder --batches 10000
    """
