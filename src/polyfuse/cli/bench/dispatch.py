"""`polyfuse bench dispatch`."""

from pathlib import Path

import click
from rich.table import Table

from polyfuse.cli._device import chosen_device
from polyfuse.cli._options import device_option, known_ops, ops_option, out_option
from polyfuse.cli._terminal import activity, console


@click.command()
@ops_option
@device_option
@out_option
def command(op_names: tuple[str, ...], device: str | None, out: Path | None) -> None:
    """Measure the host time that the dispatcher adds to a call: with a backend that does nothing, in nanoseconds.

    \b
    Example:
      polyfuse bench dispatch --out benchmarks/results
    """
    from polyfuse.bench.dispatch import run_dispatch_bench

    op_names = known_ops(op_names)
    device = chosen_device(device, ["torch"])
    screen = console()
    with activity(screen, "measuring"):
        result = run_dispatch_bench(op_names, device)
    table = Table("op", "arrays", "resolution ns", "whole call ns", title=f"Dispatch, tensors on {result.device}")
    for row in result.rows:
        table.add_row(row.op, str(row.arrays), f"{row.resolution_ns:.0f}", f"{row.call_ns:.0f}")
    screen.print(table)
    if out:
        screen.print(f"written: {result.write(out)}", soft_wrap=True)
