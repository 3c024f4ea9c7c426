"""`polyfuse soak encoder`."""

import sys
from pathlib import Path

import click
from rich.markup import escape

from polyfuse.cli._device import default_device
from polyfuse.cli._options import device_option, out_option, tiny_option, vision_model_option
from polyfuse.cli._terminal import console, progress


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
    from polyfuse.bench.vision_models import Subject

    screen = console()
    subject = Subject(model, device or default_device(), tiny, depth or (2 if tiny else 4))
    with progress(screen) as bar:
        task = bar.add_task("soak", total=batches)
        result = Soak(subject, batches, threads, seed, lambda: bar.advance(task)).run()
    screen.print(result.table())
    for text in result.messages:
        screen.print(f"[bold red]mismatch[/] {escape(text)}", soft_wrap=True)
    if out:
        screen.print(f"written: {result.write(out)}", soft_wrap=True)
    sys.exit(0 if result.ok else 1)
