"""`polyfuse soak encoder`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from polyfuse.cli._device import default_device
from polyfuse.cli._options import device_option, out_option, tiny_option, vision_model_option
from polyfuse.cli._terminal import activity, console

if TYPE_CHECKING:
    from polyfuse.bench.soak import SoakResult


@click.command()
@vision_model_option
@click.option("--batches", type=click.IntRange(min=1), default=10_000, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--depth", type=click.IntRange(min=1), help="Layers; default 4 for speed, 2 if tiny.")
@click.option("--seed", type=int, default=0, show_default=True)
@device_option
@tiny_option
@out_option
def command(
    model: str,
    batches: int,
    threads: int,
    depth: int | None,
    seed: int,
    device: str | None,
    tiny: bool,
    out: Path | None,
) -> None:
    """Send random batches through a vision encoder's graphs, from several threads, and compare every output.

    Exit status 0 if nothing differed and no memory was lost, else 1.

    \b
    Example:
      polyfuse soak encoder --batches 10000 --threads 4
    """
    from polyfuse.bench.soak import Soak
    from polyfuse.bench.subjects.vision import VisionModel

    screen = console()
    with activity(screen, "soak", batches) as shown:
        subject = VisionModel(model, device or default_device(), tiny, depth or (2 if tiny else 4))
        result = Soak(subject, batches, threads, seed, lambda: shown.update(advance=1)).run()
    screen.print(_table(result))
    for text in result.messages:
        screen.print(f"[bold red]mismatch[/] {escape(text)}", soft_wrap=True)
    if out:
        screen.print(f"written: {result.write(out)}", soft_wrap=True)
    sys.exit(0 if result.ok else 1)


def _table(result: "SoakResult") -> Table:
    """The summary of a run."""
    table = Table(title=f"{result.model}, {result.depth} layers, on {result.device}", show_header=False)
    replays, eager = result.stats["replays"].values(), result.stats["eager_batches"]
    table.add_row("batches", f"{result.batches} of {result.items} items from {result.threads} threads")
    table.add_row("ran in", f"{sum(replays)} replays of {len(replays)} budgets, {eager} eager batches")
    table.add_row("run twice", f"{result.repeated}")
    table.add_row("buffers poisoned", f"{result.poisoned} times")
    table.add_row("mismatches", f"{result.mismatches}")
    table.add_row("largest difference", f"{result.worst:.1e} of a row's norm; the bound is {result.bound:.1e}")
    for name, (start, end) in (("allocated", result.allocated), ("reserved", result.reserved)):
        table.add_row(name, f"{end / 2**20:,.0f} MiB, grown by {(end - start) / 2**20:,.1f}")
    table.add_row("time", f"{result.seconds:.1f} s")
    return table
