"""`polyfuse bench encoder`."""

from pathlib import Path

import click

from polyfuse.cli._device import default_device
from polyfuse.cli._options import device_option, out_option, tiny_option, vision_model_option
from polyfuse.cli._terminal import console


@click.command()
@vision_model_option
@click.option("--part", "parts", multiple=True, type=click.Choice(["tower", "trace"]), help="Default: both.")
@click.option("--trace", "path", type=click.Path(exists=True, dir_okay=False), help="JSON file. Default: synthetic.")
@click.option("--requests", type=click.IntRange(min=1), default=500, show_default=True, help="Of the trace.")
@click.option("--policy", "policies", multiple=True, type=click.Choice(["greedy", "optimal"]), help="Default: both.")
@click.option("--data-parallel", is_flag=True, help="Measure this alone; for processes started by torchrun.")
@device_option
@tiny_option
@out_option
def command(
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
