"""`polyfuse bench encoder`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from polyfuse.cli._device import default_device
from polyfuse.cli._options import device_option, out_option, tiny_option, vision_model_option
from polyfuse.cli._terminal import activity, console

if TYPE_CHECKING:
    from polyfuse.bench.encoder import EncoderBench
    from polyfuse.bench.encoder.tower import TowerRow
    from polyfuse.bench.encoder.trace import TraceRow


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
    from polyfuse.bench.encoder import EncoderBench
    from polyfuse.bench.encoder.parallel import measure_parallel, torchrun_rank
    from polyfuse.bench.encoder.tower import measure_tower
    from polyfuse.bench.encoder.trace import POLICIES, load_requests, measure_trace
    from polyfuse.bench.subjects.vision import VisionModel

    screen, device = console(), device or default_device()
    if data_parallel:
        with torchrun_rank(device) as (rank, ranks, own):
            subject = VisionModel(model, own, tiny)
            result = EncoderBench.of(subject, ranks)
            result.parallel = measure_parallel(subject)
        if rank:
            return
    else:
        trace, sample = load_requests(path, requests)
        with activity(screen, "measuring") as shown:
            subject = VisionModel(model, device, tiny)
            result = EncoderBench.of(subject)
            for part in parts or ("tower", "trace"):
                if part == "tower":
                    result.tower = []
                    for tower_row in measure_tower(subject):
                        result.tower.append(tower_row)
                        shown.update(f"{tower_row.rows} rows, {tower_row.variant}")
                else:
                    result.trace = []
                    for trace_row in measure_trace(subject, trace, sample, policies or POLICIES):
                        result.trace.append(trace_row)
                        shown.update(f"trace, {trace_row.variant}")
                if out:  # what a killed run leaves behind
                    result.write(out)
    for table in _tables(result):
        screen.print(table)
    if out:
        screen.print(f"written: {result.write(out)}", soft_wrap=True)


def _tables(result: "EncoderBench") -> Iterator[Table]:
    """One table for each part that was measured."""
    title = f"{result.model}, {result.depth} layers, {result.dtype}, on {result.device}"
    if result.tower:
        yield _tower_table(result.tower, title)
    for rows in (result.trace, result.parallel):
        if rows:
            yield _trace_table(rows, title)


def _tower_table(rows: Sequence["TowerRow"], title: str) -> Table:
    columns = "rows", "items", "", "ms", "device ms", "equal", "from untouched, at most"
    table = Table(*columns, title=f"One request: {title}")
    for row in rows:
        difference = f"{max(row.difference.values()):.1e}" if row.difference else "-"
        equal = {None: "-", True: "yes", False: "[bold red]no[/]"}[row.equal]
        counts, times = (f"{row.rows}", f"{row.items}"), (f"{row.ms:.2f}", f"{row.device_ms:.2f}")
        table.add_row(*counts, row.variant, *times, equal, difference)
    return table


def _trace_table(rows: Sequence["TraceRow"], title: str) -> Table:
    first = rows[0]
    columns = "", "mean ms", "p50", "p99", "host ms", "speed-up", "req/s", "tokens/s"
    of_graphs = "waste", "replays", "eager", "pool MiB", "largest alone", "capture s"
    counts = f"{first.requests} requests, {first.items} items, {first.tokens} tokens"
    table = Table(*columns, *of_graphs, title=f"{counts}: {title}")
    for row in rows:
        times = (f"{ms:.2f}" for ms in (row.mean_ms, row.p50_ms, row.p99_ms, row.host_ms))
        rates = f"{first.mean_ms / row.mean_ms:.2f}x", f"{row.requests_per_s:.1f}", f"{row.tokens_per_s:.0f}"
        table.add_row(row.variant, *times, *rates, *_graph_cells(row.graphs or {}))
    return table


def _graph_cells(graphs: Mapping[str, Any]) -> Iterator[str]:
    """The cells of a way that runs in graphs; of another none, which leaves them empty."""
    if graphs:
        yield f"{graphs['waste']:.1%}"
        yield f"{sum(graphs['replays'].values())}"
        yield f"{graphs['eager_batches']}"
        yield f"{graphs['pool_bytes'] / 2**20:.0f}"
        yield f"{graphs['largest_pool_bytes'] / 2**20:.0f}"
        yield f"{graphs['capture_seconds']:.1f}"
