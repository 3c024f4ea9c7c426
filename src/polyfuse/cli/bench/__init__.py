"""`polyfuse bench`: what it measures without a subcommand is the ops."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape

from polyfuse.cli._device import chosen_device
from polyfuse.cli._group import ModuleGroup
from polyfuse.cli._options import (
    CONFIGURED,
    backends_option,
    check_backends,
    device_option,
    known_ops,
    ops_option,
    out_option,
)
from polyfuse.cli._terminal import activity, console

if TYPE_CHECKING:
    from polyfuse.bench.rows import Bench, LeftOut, PeerRow, Row


@click.group(cls=ModuleGroup, package=__name__, invoke_without_command=True)
@ops_option
@click.option("--case", "cases", multiple=True, help="A case by its name, or a pattern as T1*; repeat for several.")
@backends_option
@device_option
@click.option("--model", default=None, help=f"Only the cases of this model. {CONFIGURED}")
@click.option("--no-compile", is_flag=True, help="Leave out the comparison with torch.compile.")
@click.option("--peers", is_flag=True, help="Time what is installed of other packages too, each checked first.")
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds that a case may take, about. Default: 30 on a CPU, else 300.",
)
@out_option
@click.pass_context
def command(
    ctx: click.Context,
    op_names: tuple[str, ...],
    cases: tuple[str, ...],
    backends: tuple[str, ...],
    device: str | None,
    model: str | None,
    no_compile: bool,
    peers: bool,
    budget: float | None,
    out: Path | None,
) -> None:
    """Measure the ops' time per call on real-model shapes, as a fraction of the device's own stream ceiling.

    With --peers, beside flash-linear-attention, vLLM, SGLang, Liger and FlashAttention, where they are installed.
    Cold times are of calls whose inputs no cache holds.

    \b
    Example:
      polyfuse bench --op silu_mul_block_quant --backend triton --out benchmarks/results
    """
    if ctx.invoked_subcommand is not None:
        return
    import torch

    from polyfuse.bench.declined import declined
    from polyfuse.bench.ops import run_bench
    from polyfuse.cli.bench._tables import ops_table
    from polyfuse.dispatch import device_of

    op_names = known_ops(op_names)
    check_backends(backends)
    device = chosen_device(device, ["torch"])
    screen = console()

    def keep(result: "Bench", found: "Row | PeerRow | LeftOut") -> None:
        if out:  # what a killed run leaves behind
            result.write(out)

    with activity(screen, "measuring") as status:
        result = run_bench(
            op_names,
            backends,
            device,
            model,
            not no_compile,
            keep,
            cases=cases,
            peers=peers,
            budget=budget,
            on_start=status.update,
        )
    screen.print(ops_table(result))
    if peers:
        _print_peers(screen, result)
    for left in result.left_out:
        screen.print(f"[yellow]left out[/] {escape(str(left))}", soft_wrap=True)
    where = device_of(torch.empty(0, device=device), "torch")
    found = [case for case in declined(where, model=model) if not op_names or case.op in op_names]
    for case in found:
        screen.print(f"[bold red]falls through[/] on {where.kind}: {escape(str(case))}", soft_wrap=True)
    if not found:
        screen.print(f"no case falls through: the first backend for {where.kind} declines none")
    if out:
        screen.print(f"written: {result.write(out)}")


def _print_peers(screen: Console, result: "Bench") -> None:
    """The peers beside ours, and what of other packages is not there."""
    from polyfuse.bench.peers import PACKAGES
    from polyfuse.cli.bench._tables import peers_table

    if result.peers:
        screen.print(peers_table(result))
    else:
        screen.print("no peer that is installed has one of these cases on this device")
    for row in result.peers:
        if row.note:
            colour = "red" if row.status in ("wrong", "failed") else "yellow"
            said = escape(f"{row.peer} {row.version}, {row.case} of {row.model}: {row.note}")
            screen.print(f"[{colour}]{row.status}[/] {said}", soft_wrap=True)
    for package in PACKAGES:
        if package.note and result.packages.get(package.name):
            screen.print(f"{package.name}: {package.note}", soft_wrap=True)
    if missing := [name for name, version in result.packages.items() if version is None]:
        screen.print(f"not installed: {', '.join(missing)}", soft_wrap=True)
