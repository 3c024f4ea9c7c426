"""Time of a vision encoder, untouched and in graphs: what `polyfuse bench encoder` measures.

A latency is the wall time of one call with the device idle before and after it. Weights and pixels are random.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table

from polyfuse.bench.ops import write_json
from polyfuse.bench.traces import load_trace, synthetic_trace
from polyfuse.bench.vision_models import Request, Subject, uncaptured
from polyfuse.conformance.report import versions
from polyfuse.conformance.runner import device_name
from polyfuse.runtime.encoder.data_parallel import DataParallelEncoder
from polyfuse.runtime.encoder.manager import EncoderGraphManager
from polyfuse.runtime.packing.planner import suggest_budgets
from polyfuse.spec import fail

Call = Callable[..., Any]

POLICIES = ("greedy", "optimal")
# 256, 1024 and 4096 patches of one image, and 15,048 of eight.
TOWER: tuple[Request, ...] = (
    [[1, 16, 16]],
    [[1, 32, 32]],
    [[1, 64, 64]],
    [[1, h, w] for h, w in ((60, 80), (14, 20), (46, 68), (24, 38), (32, 32), (56, 60), (26, 40), (18, 28))],
)
WARM_UP = 5
SMALLEST = 64  # power-of-two budget
PARALLEL_IMAGES, PARALLEL_PIXELS, PARALLEL_REQUESTS = 20, 336, 50
COUNTS = ("requests", "items", "replays", "eager_batches", "eager_items", "tokens", "padding")


@dataclass(frozen=True)
class TowerRow:
    """One way to run one request. `ms` is the median latency, `device_ms` the time per call of calls in a row.

    `equal`: a replay gives the bits of the uncaptured forward on the same buffers. `difference`: of each output from
    the untouched model's, in norm, as a share of that one's.
    """

    rows: int
    items: int
    variant: str
    ms: float
    device_ms: float
    equal: bool | None = None
    difference: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TraceRow:
    """One way to run some requests one by one: latencies, and `host_ms`, the mean time until a call returns.

    `graphs` has the manager's settings, its stats of these requests, and as `largest_pool_bytes` what its pool takes
    with the largest budget alone.
    """

    variant: str
    requests: int
    items: int
    tokens: int
    mean_ms: float
    p50_ms: float
    p99_ms: float
    host_ms: float
    requests_per_s: float
    items_per_s: float
    tokens_per_s: float
    graphs: Mapping[str, Any] | None = None


@dataclass
class EncoderBench:
    """All that was measured, with what it was measured on. `parallel` is one rank and then all `ranks`."""

    device: str
    model: str
    dtype: str
    depth: int
    ranks: int = 1
    tower: list[TowerRow] = field(default_factory=list)
    trace: list[TraceRow] = field(default_factory=list)
    parallel: list[TraceRow] = field(default_factory=list)
    versions: Mapping[str, str] = field(default_factory=versions)

    @classmethod
    def of(cls, subject: Subject, ranks: int = 1) -> "EncoderBench":
        """Nothing measured yet."""
        dtype = str(subject.dtype).removeprefix("torch.")
        return cls(device_name(subject.device), subject.name, dtype, subject.depth, ranks)

    def write(self, folder: Path) -> Path:
        """Write what there is into a JSON file named after the device, and the ranks if several; returns its path."""
        prefix = "encoder_" if self.ranks == 1 else f"encoder_{self.ranks}x_"
        return write_json(folder, prefix, self.device, asdict(self))

    def tables(self) -> Iterator[Table]:
        """One for each part that was measured."""
        title = f"{self.model}, {self.depth} layers, {self.dtype}, on {self.device}"
        if self.tower:
            columns = "rows", "items", "", "ms", "device ms", "equal", "from untouched, at most"
            table = Table(*columns, title=f"One request: {title}")
            for t in self.tower:
                change = f"{max(t.difference.values()):.1e}" if t.difference else "-"
                equal = {None: "-", True: "yes", False: "[bold red]no[/]"}[t.equal]
                table.add_row(f"{t.rows}", f"{t.items}", t.variant, f"{t.ms:.2f}", f"{t.device_ms:.2f}", equal, change)
            yield table
        for rows in filter(None, (self.trace, self.parallel)):
            columns = "", "mean ms", "p50", "p99", "host ms", "speed-up", "req/s", "tokens/s"
            of_graphs = "waste", "replays", "eager", "pool MiB", "largest alone", "capture s"
            counts = f"{rows[0].requests} requests, {rows[0].items} items, {rows[0].tokens} tokens"
            table = Table(*columns, *of_graphs, title=f"{counts}: {title}")
            for r in rows:
                times = (f"{ms:.2f}" for ms in (r.mean_ms, r.p50_ms, r.p99_ms, r.host_ms))
                rates = f"{rows[0].mean_ms / r.mean_ms:.2f}x", f"{r.requests_per_s:.1f}", f"{r.tokens_per_s:.0f}"
                table.add_row(r.variant, *times, *rates, *_graph_cells(r.graphs or {}))
            yield table


def _graph_cells(graphs: Mapping[str, Any]) -> Iterator[str]:
    if graphs:
        yield from (f"{graphs['waste']:.1%}", f"{sum(graphs['replays'].values())}", f"{graphs['eager_batches']}")
        yield from (f"{graphs[size] / 2**20:.0f}" for size in ("pool_bytes", "largest_pool_bytes"))
        yield f"{graphs['capture_seconds']:.1f}"


def load_requests(path: str | None, count: int) -> tuple[Sequence[Request], Sequence[Request]]:
    """`count` requests to measure, and others to choose budgets for: what follows in the file, or all if nothing does.

    Without a file both are drawn, from different seeds.
    """
    if path is None:
        return synthetic_trace(count, seed=1), synthetic_trace(2000, seed=2)
    trace = load_trace(path)
    return trace[:count], trace[count:] or trace


def measure_tower(subject: Subject) -> Iterator[TowerRow]:
    """Requests of four sizes through the untouched model, the adapter uncaptured, and graphs of exactly their size.

    `TOWER`; 1, 2, 4 and 8 images for a model of a fixed resolution; a tiny model's sides are a quarter as long.
    """
    requests = [[[1, 1, 1]] * images for images in (1, 2, 4, 8)] if subject.fixed else TOWER
    if subject.tiny:
        requests = [[[t, h // 8 * 2, w // 8 * 2] for t, h, w in request] for request in requests]
    subject.reserve(max(map(subject.rows, requests)))
    adapter = subject.encoder(False)
    encoders = {"graph": adapter} | ({"graph, compiled blocks": subject.encoder(True)} if subject.captures else {})
    budgets = [subject.tokens(request) for request in requests]
    # Greedy takes the smallest budget that holds a request: its own, whatever was measured.
    managers = {name: EncoderGraphManager(e, budgets=budgets, policy="greedy") for name, e in encoders.items()}
    for request in requests:
        given = subject.arguments(request)
        untouched = partial(_untouched, subject, *given)
        theirs = _tensors(untouched())
        yield _tower_row(subject, request, "untouched", untouched)
        yield _tower_row(subject, request, "adapter", partial(uncaptured, adapter, *given))
        for name, manager in managers.items():
            ours = _tensors(manager.execute(*given))
            equal = _equals_uncaptured(manager, given, subject.tokens(request))
            change = {key: _change(theirs[key], ours[key]) for key in theirs}
            yield _tower_row(subject, request, name, partial(manager.execute, *given), equal, change)
    for manager in managers.values():
        manager.clear()


def measure_trace(
    subject: Subject, trace: Sequence[Request], sample: Sequence[Request], policies: Sequence[str] = POLICIES
) -> Iterator[TraceRow]:
    """A trace's requests one by one, through the untouched model and in graphs.

    `optimal` is the default way, with budgets that suit the requests in `sample`. `greedy` is how other managers fill
    power-of-two budgets: with blocks compiled as in `optimal`, so that only the packing differs, and without.
    """
    subject.reserve(max(map(subject.rows, trace)))
    yield _trace_row(subject, trace, "untouched", _warmed_up(subject, trace, partial(_untouched, subject)))
    totals, step = [subject.tokens(request) for request in sample], subject.encoder(False).token_multiple
    if "greedy" in policies:
        powers = [SMALLEST]
        while powers[-1] < max(totals):
            powers.append(2 * powers[-1])
        budgets = [-(-tokens // step) * step for tokens in powers]
        for blocks in sorted({False, subject.captures}):
            name = "greedy" if blocks == subject.captures else "greedy, blocks not compiled"
            yield _graph_row(subject, trace, name, blocks, budgets=budgets, policy="greedy")
    if "optimal" in policies:
        budgets = list(suggest_budgets(totals, smallest=step, largest=max(totals), multiple_of=step))
        yield _graph_row(subject, trace, "optimal", subject.captures, budgets=budgets)


def measure_parallel(subject: Subject) -> list[TraceRow]:
    """Twenty images of 336 x 336 pixels on rank 0 alone, and over all ranks of the initialised torch.distributed.

    All ranks call it together; what it returns counts on rank 0.
    """
    side = subject.merge * round(PARALLEL_PIXELS / (subject.patch_size * subject.merge))
    request, ranks = [[1, side, side]] * PARALLEL_IMAGES, dist.get_world_size()
    trace = [request] * PARALLEL_REQUESTS
    subject.reserve(subject.rows(request))
    shares = PARALLEL_IMAGES, -(-PARALLEL_IMAGES // ranks), max(1, PARALLEL_IMAGES // ranks)
    budgets = [subject.tokens(request[:images]) for images in shares]
    manager = EncoderGraphManager(subject.encoder(), budgets=budgets, max_items=PARALLEL_IMAGES)
    manager.capture()
    calls = _warmed_up(subject, trace, DataParallelEncoder(manager).execute)
    rows = [_trace_row(subject, trace, f"{ranks} ranks", calls)]
    dist.barrier()
    if dist.get_rank() == 0:
        rows.insert(0, _trace_row(subject, trace, "one rank", _warmed_up(subject, trace, manager.execute)))
    dist.barrier()
    return rows


@contextmanager
def torchrun_rank(device: str) -> Iterator[tuple[int, int, str]]:
    """This process as a rank of torchrun's, by NCCL on CUDA and gloo elsewhere: the rank, how many, and its device.

    Raises `SpecError` in a process that torchrun did not start.
    """
    if "LOCAL_RANK" not in os.environ:
        command = "torchrun --nproc-per-node 4 -m polyfuse bench encoder --data-parallel"
        fail("bench encoder", "--data-parallel", "a process started by torchrun", "none of its variables", command)
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=torch.device(device))
    else:
        dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), dist.get_world_size(), device
    finally:
        dist.destroy_process_group()


def _untouched(subject: Subject, *given: torch.Tensor) -> Any:
    with torch.inference_mode():
        return subject.model(*(tensor.to(subject.device) for tensor in given))


def _warmed_up(subject: Subject, trace: Sequence[Request], run: Call) -> list[Call]:
    """A call for each request, the first few of them made once."""
    calls: list[Call] = [partial(run, *subject.arguments(request)) for request in trace]
    for call in calls[:WARM_UP]:
        call()
    return calls


def _seconds(subject: Subject, calls: Sequence[Call]) -> tuple[list[float], list[float]]:
    """Latencies, and times until the calls returned."""
    walls, hosts = [], []
    for call in calls:
        subject.wait()
        started = time.perf_counter()
        call()
        hosts.append(time.perf_counter() - started)
        subject.wait()
        walls.append(time.perf_counter() - started)
    return walls, hosts


def _tower_row(subject: Subject, request: Request, variant: str, call: Call, *compared: Any) -> TowerRow:
    calls = [call] * (3 if subject.device == "cpu" else 20)
    _seconds(subject, calls[:WARM_UP])
    walls, _ = _seconds(subject, calls)
    started = time.perf_counter()
    for call in calls:
        call()
    subject.wait()
    queued = (time.perf_counter() - started) / len(calls)
    return TowerRow(subject.rows(request), len(request), variant, _ms(np.median(walls)), _ms(queued), *compared)


def _ms(seconds: Any) -> float:
    return round(float(seconds) * 1e3, 4)


def _trace_row(subject: Subject, trace: Sequence[Request], variant: str, calls: Sequence[Call]) -> TraceRow:
    walls, hosts = _seconds(subject, calls)
    requests, items, tokens = len(trace), sum(map(len, trace)), sum(map(subject.tokens, trace))
    mean, p50, p99, host = map(_ms, (np.mean(walls), *np.percentile(walls, (50, 99)), np.mean(hosts)))
    per_s = [round(count / sum(walls), 2) for count in (requests, items, tokens)]
    return TraceRow(variant, requests, items, tokens, mean, p50, p99, host, per_s[0], per_s[1], per_s[2])


def _graph_row(subject: Subject, trace: Sequence[Request], variant: str, blocks: bool, **settings: Any) -> TraceRow:
    encoder = subject.encoder(blocks)
    alone = EncoderGraphManager(encoder, **settings | {"budgets": settings["budgets"][-1:]})
    alone.capture()
    facts = settings | {"compiled_blocks": blocks, "largest_pool_bytes": alone.stats.pool_bytes}
    alone.clear()
    manager = EncoderGraphManager(encoder, **settings)
    calls = _warmed_up(subject, trace, manager.execute)
    before = manager.stats
    row = _trace_row(subject, trace, variant, calls)
    after = manager.stats
    manager.clear()
    after = replace(after, **{name: getattr(after, name) - getattr(before, name) for name in COUNTS})
    return replace(row, graphs=facts | after.as_dict())


def _tensors(result: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What a model returned, with lists of tensors taken apart."""
    lists = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in result.items()}
    return {f"{name}_{i}" if i else name: tensor for name, value in lists.items() for i, tensor in enumerate(value)}


def _change(old: torch.Tensor, new: torch.Tensor) -> float:
    return float((new.double() - old.double()).norm() / old.double().norm())


def _equals_uncaptured(manager: EncoderGraphManager, given: Sequence[torch.Tensor], budget: int) -> bool:
    """Whether the budget is replayed, and gives the bits that the forward gives on the buffers it read."""
    before = manager.stats.replays[budget]
    replayed = manager.run(manager.encoder.request(*given))
    if manager.stats.replays[budget] == before:
        return False
    computed = manager.recompute(budget)
    return all(torch.equal(rows, computed[name][: len(rows)]) for name, rows in replayed.items())
