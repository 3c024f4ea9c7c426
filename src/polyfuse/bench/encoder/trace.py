"""Many requests one by one: through the untouched model, and in graphs that are filled in several ways."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from polyfuse.bench.subjects.vision import Request, VisionModel
from polyfuse.bench.timing import Call
from polyfuse.bench.traces import load_trace, synthetic_trace
from polyfuse.runtime.encoder.manager import EncoderGraphManager
from polyfuse.runtime.packing.planner import suggest_budgets

POLICIES = ("greedy", "optimal")
WARM_UP = 5
SMALLEST = 64  # power-of-two budget
COUNTS = ("requests", "items", "replays", "eager_batches", "eager_items", "tokens", "padding")


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


def load_requests(path: str | None, count: int) -> tuple[Sequence[Request], Sequence[Request]]:
    """`count` requests to measure, and others to choose budgets for: what follows in the file, or all if nothing does.

    Without a file both are drawn, from different seeds.
    """
    if path is None:
        return synthetic_trace(count, seed=1), synthetic_trace(2000, seed=2)
    trace = load_trace(path)
    return trace[:count], trace[count:] or trace


def measure_trace(
    subject: VisionModel, trace: Sequence[Request], sample: Sequence[Request], policies: Sequence[str] = POLICIES
) -> Iterator[TraceRow]:
    """Measure a trace's requests one by one, through the untouched model and in graphs.

    `optimal` is the default way, with budgets that suit the requests in `sample`. `greedy` is how other managers fill
    power-of-two budgets: with blocks compiled as in `optimal`, so that only the packing differs, and without.
    """
    subject.reserve(max(map(subject.rows, trace)))
    yield trace_row(subject, trace, "untouched", warmed_up(subject, trace, subject.untouched))
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


def warmed_up(subject: VisionModel, trace: Sequence[Request], run: Callable[..., Any]) -> list[Call]:
    """A call of `run` for every request, of which the first few have run once."""
    calls: list[Call] = [partial(run, *subject.arguments(request)) for request in trace]
    for call in calls[:WARM_UP]:
        call()
    return calls


def trace_row(subject: VisionModel, trace: Sequence[Request], variant: str, calls: Sequence[Call]) -> TraceRow:
    """The row of a trace's requests, each run once by its call."""
    times = subject.clock.latencies(calls)
    requests, items, tokens = len(trace), sum(map(len, trace)), sum(map(subject.tokens, trace))
    p50, p99 = np.percentile(times.done, (50, 99))
    total = sum(times.done)
    return TraceRow(
        variant,
        requests,
        items,
        tokens,
        mean_ms=_ms(np.mean(times.done)),
        p50_ms=_ms(p50),
        p99_ms=_ms(p99),
        host_ms=_ms(np.mean(times.returned)),
        requests_per_s=round(requests / total, 2),
        items_per_s=round(items / total, 2),
        tokens_per_s=round(tokens / total, 2),
    )


def _graph_row(subject: VisionModel, trace: Sequence[Request], variant: str, blocks: bool, **settings: Any) -> TraceRow:
    encoder = subject.encoder(blocks)
    alone = EncoderGraphManager(encoder, **settings | {"budgets": settings["budgets"][-1:]})
    alone.capture()
    facts = settings | {"compiled_blocks": blocks, "largest_pool_bytes": alone.stats.pool_bytes}
    alone.clear()
    manager = EncoderGraphManager(encoder, **settings)
    calls = warmed_up(subject, trace, manager.execute)
    before = manager.stats
    row = trace_row(subject, trace, variant, calls)
    after = manager.stats
    manager.clear()
    of_these = {name: getattr(after, name) - getattr(before, name) for name in COUNTS}
    return replace(row, graphs=facts | replace(after, **of_these).as_dict())


def _ms(seconds: Any) -> float:
    return round(float(seconds) * 1e3, 4)
