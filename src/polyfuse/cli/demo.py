"""`polyfuse demo`."""

import sys

import click

from polyfuse.cli._device import default_device
from polyfuse.cli._terminal import console


@click.command()
@click.option("--fast", is_flag=True, help="Use a tiny tower instead of the real one.")
def command(fast: bool) -> None:
    """Show in about a minute what the ops do to two models, and how backends are compared with the oracle.

    Real photos go through the Qwen3-VL vision tower, and a tiny Qwen3.5 model generates, both untouched and
    accelerated: on a CPU this is about what they compute, not about speed. Then two cases of every op run on every
    backend. The last lines say what that shows and what not. Exit status 1 if something is wrong.

    \b
    Example:
      polyfuse demo --fast
    """
    out, device = console(), default_device()
    from polyfuse.cli._demo import conclude, run_cases, run_text_model, run_tower

    problems = [*run_tower(fast, out, device), *run_text_model(out, device)]
    cases, wrong = run_cases(out, device)
    sys.exit(conclude(out, device, cases, problems + wrong))
