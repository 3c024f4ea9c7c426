"""`polyfuse demo`."""

import sys
from pathlib import Path

import click

from polyfuse.cli._conformance import run_conformance
from polyfuse.cli._device import default_device
from polyfuse.cli._terminal import console


@click.command()
@click.option("--fast", is_flag=True, help="Use a tiny tower instead of the real one.")
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("report"),
    show_default=True,
    help="Folder for the conformance report.",
)
def command(fast: bool, report: Path) -> None:
    """Run real photos through the Qwen3-VL vision tower, untouched and accelerated, then run conformance.

    \b
    Example:
      polyfuse demo --fast
    """
    out, device = console(), default_device()
    from polyfuse.cli._demo import run_demo

    status = run_demo(fast, out, device)
    conformance = run_conformance(out, report, level="quick", device=device)
    sys.exit(status or conformance)
