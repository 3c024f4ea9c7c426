"""`polyfuse bench encoder` and `polyfuse soak encoder`."""

import sys
from pathlib import Path

import click
from rich.markup import escape

from polyfuse.cli._terminal import console, default_device, progress

model_option = click.option(
    "--model",
    type=click.Choice(["qwen3_vl", "qwen3_5", "qwen2_5_vl", "siglip"]),
    default="qwen3_vl",
    show_default=True,
    help="Its weights are random.",
)
device_option = click.option("--device", default=None, help="cpu, cuda, ...; the accelerator if there is one.")
tiny_option = click.option("--tiny", is_flag=True, help="Take a tiny model instead of the real one.")
out_option = click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the JSON file.")


@click.command("encoder")
@model_option
@click.option("--part", "parts", multiple=True, type=click.Choice(["tower", "trace"]), help="Default: both.")
@click.option("--trace", "path", type=click.Path(exists=True, dir_okay=False), help="JSON file. Default: synthetic.")
@click.option("--requests", type=click.IntRange(min=1), default=500, show_default=True, help="Of the trace.")
@click.option("--policy", "policies", multiple=True, type=click.Choice(["greedy", "optimal"]), help="Default: both.")
@click.option("--data-parallel", is_flag=True, help="Measure this alone; for processes started by torchrun.")
@device_option
@tiny_option
@out_option
def bench_encoder(
    model: str,
    parts: tuple[str, ...],
    path: str | None,
    requests: int,
    policies: tuple[str, ...],
    data_parallel: bool,
    device: str | None,
    tiny: bool,
    out: Path | None,
) -> None:
    """Measure a vision encoder, untouched and in graphs: requests of four sizes, and a trace of many.

    Budgets are chosen for other requests than the measured ones: another draw, or what follows them in the file.

    \b
    Example:
      polyfuse bench encoder --model qwen3_vl --part trace --out benchmarks/results
      torchrun --nproc-per-node 4 -m polyfuse bench encoder --data-parallel
    """
    from polyfuse.bench import encoder as suite
    from polyfuse.bench.vision_models import Subject

    screen, device = console(), device or default_device()
    if data_parallel:
        with suite.torchrun_rank(device) as (rank, ranks, own):
            subject = Subject(model, own, tiny)
            result = suite.EncoderBench.of(subject, ranks)
            result.parallel = suite.measure_parallel(subject)
        if rank:
            return
    else:
        trace, sample = suite.load_requests(path, requests)
        subject = Subject(model, device, tiny)
        result = suite.EncoderBench.of(subject)
        with screen.status("measuring"):
            for part in parts or ("tower", "trace"):
                if part == "tower":
                    result.tower = list(suite.measure_tower(subject))
                else:
                    result.trace = list(suite.measure_trace(subject, trace, sample, policies or suite.POLICIES))
                if out:  # what a killed run leaves behind
                    result.write(out)
    for table in result.tables():
        screen.print(table)
    if out:
        screen.print(f"written: {result.write(out)}", soft_wrap=True)


@click.group()
def soak() -> None:
    """Run random work for long, and compare every result.

    \b
    Example:
      polyfuse soak encoder --batches 10000
    """


@soak.command("encoder")
@model_option
@click.option("--batches", type=click.IntRange(min=1), default=10_000, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--depth", type=click.IntRange(min=1), help="Layers; default 4 for speed, 2 if tiny.")
@click.option("--seed", type=int, default=0, show_default=True)
@device_option
@tiny_option
@out_option
def soak_encoder(
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
