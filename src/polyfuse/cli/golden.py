"""`polyfuse golden`."""

import sys
from pathlib import Path
from typing import Any

import click

from polyfuse.cli._group import Group
from polyfuse.cli._options import known_ops, ops_option
from polyfuse.cli._terminal import activity, console


@click.group(cls=Group)
def command() -> None:
    """Golden vectors: test a kernel that Python cannot call.

    \b
    Example:
      polyfuse golden export golden --op gated_rms_norm
      polyfuse golden verify golden outputs
    """


@command.command()
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@ops_option
@click.option(
    "--cases",
    "choice",
    type=click.Choice(["core", "all"]),
    default="core",
    show_default=True,
    help="core: the few without which a backend does not have the op. all: with real models' shapes.",
)
@click.option("--case", "names", multiple=True, metavar="PATTERN", help="Cases by name, of all; repeat for several.")
@click.option("--seed", default=0, show_default=True, help="Of the inputs.")
@click.option(
    "--max-elements",
    default=1_000_000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Leave out cases with more elements than this in inputs and results.",
)
def export(
    folder: Path, op_names: tuple[str, ...], choice: str, names: tuple[str, ...], seed: int, max_elements: int
) -> None:
    """Write inputs and the interval of every result into DIR, with the C program that checks outputs.

    The cases of the default take about 10 MB.

    \b
    Example:
      polyfuse golden export golden --op silu_mul_block_quant --case 'fill_*'
    """
    from polyfuse.conformance.golden import export as write

    with activity(console(), "golden vectors") as shown:
        options: dict[str, Any] = {"choice": choice, "names": names, "seed": seed, "max_elements": max_elements}
        done = write(folder, known_ops(op_names), **options, on_case=lambda name: shown.update(name, advance=1))
    for name, why in done.left_out.items():
        click.echo(f"left out  {name}: {why}")
    click.echo(f"{len(done.cases)} cases, {done.size / 1e6:.1f} MB in {folder}")


@command.command()
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.argument("outputs", type=click.Path(file_okay=False, path_type=Path))
def verify(folder: Path, outputs: Path) -> None:
    """Judge OUTPUTS, the results of another kernel on the golden vectors in DIR, as conformance would.

    Exit status 0 if every result is there and right, 1 if one is not, 2 if DIR cannot be used.

    \b
    Example:
      polyfuse golden verify golden outputs
    """
    from polyfuse.conformance.golden import verify as judge

    verdicts = judge(folder, outputs)
    for verdict in verdicts:
        for problem in verdict.problems:
            click.echo(f"WRONG  {verdict.case}: {problem}")
        if not verdict.problems:
            click.echo(f"right  {verdict.case}")
    right = sum(not verdict.problems for verdict in verdicts)
    click.echo(f"{right} of {len(verdicts)} cases right")
    sys.exit(0 if right == len(verdicts) > 0 else 1)
