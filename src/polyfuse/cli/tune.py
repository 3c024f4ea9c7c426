"""`polyfuse tune`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from polyfuse.cli._device import default_device
from polyfuse.cli._options import device_option, known_ops, ops_option
from polyfuse.cli._terminal import activity, console

if TYPE_CHECKING:
    from polyfuse.bench.tune import Sweep, Tuned


@click.command()
@ops_option
@device_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the YAML file. Default: the user's cache.",
)
def command(op_names: tuple[str, ...], device: str | None, out: Path | None) -> None:
    """Sweep the launch parameters of Triton kernels on this device, and keep what is faster and changes no bit.

    Each winner passes the op's core cases of conformance. What is found holds for this kernel source, Triton and
    architecture, from the next process on; with POLYFUSE_TUNING=frozen a call for which there is none is an error.

    \b
    Example:
      polyfuse tune --op gated_rms_norm
    """
    from polyfuse.bench.tune import tune

    op_names, screen = known_ops(op_names), console()

    def show(result: "Tuned", sweep: "Sweep") -> None:
        status.update(f"{sweep.op}: {sweep.tried} tried")

    with activity(screen, "measuring") as status:
        result = tune(op_names, device or default_device(), show)
    table = Table("op", "up to size", "calls", "rule", "chosen", "time", "tried", title=f"Tiles on {result.device}")
    for sweep in result.sweeps:
        size = "any" if sweep.size is None else str(sweep.size)
        values = [" ".join(f"{name}={value}" for name, value in x.items()) for x in (sweep.rule, sweep.chosen)]
        table.add_row(sweep.op, size, str(len(sweep.calls)), *values, f"{sweep.ratio:.2f}x", str(sweep.tried))
    screen.print(table)
    for sweep in result.sweeps:
        for tile, reason in sweep.rejected.items():
            screen.print(escape(f"rejected for {sweep.op}: {tile}: {reason}"), soft_wrap=True)
    screen.print(f"written: {result.save(out)}", soft_wrap=True)
