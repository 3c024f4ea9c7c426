"""`polyfuse warmup`."""

from pathlib import Path

import click
from rich.table import Table

from polyfuse.cli._device import default_device
from polyfuse.cli._options import CONFIGURED, device_option, known_ops, ops_option, out_option
from polyfuse.cli._terminal import activity, console


def _workers() -> int:
    """How many threads `polyfuse.warmup` takes, which is asked when the command runs: the module imports torch."""
    from polyfuse.bench.warmup import WORKERS

    return WORKERS


@click.command()
@click.option("--model", required=True, help=f"The model whose shapes are meant. {CONFIGURED}")
@ops_option
@device_option
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=_workers,
    show_default="those of polyfuse.warmup",
    help="Threads that compile.",
)
@out_option
def command(model: str, op_names: tuple[str, ...], device: str | None, workers: int, out: Path | None) -> None:
    """Compile the kernels that a model's calls need on this device, in parallel, before the first call comes.

    Later processes read them from Triton's cache. On a CPU nothing is compiled, which is an error.

    \b
    Example:
      polyfuse warmup --model qwen3_next_80b
    """
    from polyfuse.bench.warmup import warmup

    op_names, device = known_ops(op_names), device or default_device()
    screen = console()
    with activity(screen, "compiling"):
        result = warmup(model, device, ops=op_names, workers=workers)
    table = Table("kernel", "module", "seconds", "", title=f"Kernels of {model} on {result.device}")
    for kernel in result.kernels:
        how = "from Triton's cache" if kernel.cached else "compiled"
        table.add_row(kernel.name, kernel.module, f"{kernel.seconds:.2f}", how)
    screen.print(table)
    total = sum(kernel.seconds for kernel in result.kernels)
    screen.print(f"{result.calls} calls in {result.seconds:.1f} s; compilers took {total:.1f} s in {workers} threads")
    if out:
        screen.print(f"written: {result.write(out)}", soft_wrap=True)
