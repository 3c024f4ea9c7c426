"""`polyfuse shadow`."""

import sys
from pathlib import Path

import click

from polyfuse.cli._device import chosen_device
from polyfuse.cli._group import Group
from polyfuse.cli._options import check_backends, device_option


@click.group(cls=Group)
def command() -> None:
    """Shadow mode: what a running program wrote of calls with wrong results.

    \b
    Example:
      polyfuse shadow replay dump/gated_rms_norm-torch-1234-56.npz
    """


@command.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--backend", default=None, help="Another backend than the one that the call ran on.")
@device_option
def replay(file: Path, backend: str | None, device: str | None) -> None:
    """Judge the recorded results in FILE, a call that shadow mode wrote, and run the call again.

    Exit status 0 if the results of now are right, else 1.

    \b
    Example:
      polyfuse shadow replay dump/gated_rms_norm-torch-1234-56.npz --backend triton
    """
    from polyfuse.conformance import shadow

    op, recorded, given, results = shadow.load(file)
    backend = backend or recorded
    device = chosen_device(device, check_backends([backend]))
    click.echo(f"recorded  {op} {recorded}: {shadow.problem_of(op, given, results) or 'right'}")
    problem = shadow.again(op, backend, given, device)
    click.echo(f"now       {op} {backend} on {device}: {problem or 'right'}")
    sys.exit(1 if problem else 0)
