"""`polyfuse bench host`."""

from pathlib import Path

import click
from rich.table import Table

from polyfuse.cli._device import chosen_device
from polyfuse.cli._options import device_option, known_ops, ops_option, out_option
from polyfuse.cli._terminal import activity, console

COLUMNS = ("op", "arrays", "resolve", "dispatch")
OF_CALLS = ("allocate", "launch", "whole call", "of silu's", "backend")


@click.command()
@ops_option
@device_option
@out_option
def command(op_names: tuple[str, ...], device: str | None, out: Path | None) -> None:
    """Measure the host time of a call and what it goes to, in microseconds.

    That is: resolving it to a backend; all that the dispatcher does, with a backend that does nothing; allocating the
    results; what is left, which binds the arguments and starts the kernels. On a CPU a backend computes in its call,
    and the dispatcher's part is measured alone.

    \b
    Example:
      polyfuse bench host --out benchmarks/results
    """
    from polyfuse.bench.host import run_host_bench

    op_names = known_ops(op_names)
    device = chosen_device(device, ["torch"])
    screen = console()
    with activity(screen, "measuring"):
        result = run_host_bench(op_names, device)
    silu = next((row.call_ns for row in result.rows if row.op == "silu_mul_block_quant"), None)
    of_calls = any(row.call_ns for row in result.rows)
    table = Table(*COLUMNS, *(OF_CALLS if of_calls else ()), title=f"Host time of a call, us, on {result.device}")
    for row in result.rows:
        cells = [row.op, str(row.arrays), _us(row.resolution_ns), _us(row.dispatch_ns)]
        if of_calls:
            share = f"{row.call_ns / silu:.2f}x" if row.call_ns and silu else "-"
            cells += [_us(row.allocation_ns), _us(row.launch_ns), _us(row.call_ns), share, row.backend or "-"]
        table.add_row(*cells)
    screen.print(table)
    if out:
        screen.print(f"written: {result.write(out)}", soft_wrap=True)


def _us(nanoseconds: float | None) -> str:
    return "-" if nanoseconds is None else f"{nanoseconds / 1e3:.2f}"
