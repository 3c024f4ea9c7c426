"""Time of every op against the machine's own ceiling: what `polyfuse bench` measures.

Device time is that of a CUDA-graph replay of many calls, divided by their number; without a GPU it is wall time.
Host time is wall time per call over calls that are queued without waiting for the device.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from polyfuse.bench.cases import bench_cases
from polyfuse.bench.one_case import CaseBench
from polyfuse.bench.peers import PACKAGES
from polyfuse.bench.results import device_name
from polyfuse.bench.rows import Bench, LeftOut, PeerRow, Row
from polyfuse.bench.timing import Clock

__all__ = ["Bench", "LeftOut", "PeerRow", "Row", "run_bench", "stream_ceiling"]

CEILING_BYTES = 2**31
CPU_BUDGET, BUDGET = 30.0, 300.0  # seconds of a case, if nothing else is asked for


def run_bench(
    ops: Sequence[str] = (),
    backends: Sequence[str] = (),
    device: str = "cpu",
    model: str | None = None,
    compiled: bool = True,
    on_found: Callable[[Bench, Row | PeerRow | LeftOut], None] | None = None,
    *,
    cases: Sequence[str] = (),
    peers: bool = False,
    budget: float | None = None,
    on_start: Callable[[str], None] | None = None,
) -> Bench:
    """Measure the bench cases of the model files.

    `ops`, `backends` and `cases`, which are patterns of names, default to all; PyTorch eager (and, with `compiled`,
    torch.compile of the same code) is always measured for the ratios, and with `peers` what is installed of other
    packages. `budget` is the seconds that a case takes, about: slow calls are measured less often, and a case of which
    one call would take longer is left out. `on_start` is told what is measured next.
    Raises `SpecError` for a model that is unknown, and where no case is asked for.
    """
    chosen = bench_cases(ops, model, cases)
    if budget is None:
        budget = CPU_BUDGET if device == "cpu" else BUDGET
    say = on_start or (lambda _: None)
    say("stream ceiling")
    result = Bench(device_name(device), round(stream_ceiling(device), 1), budget_s=budget)
    if peers:
        result.packages = {package.name: package.version() for package in PACKAGES}
    for case in chosen:
        for found in CaseBench(case, backends, device, compiled, peers, result, say).run():
            result.add(found)
            if on_found:
                on_found(result, found)
    return result


def stream_ceiling(device: str) -> float:
    """Gigabytes per second of a large copy on the device, read and written bytes both counted."""
    clock, on_gpu = Clock(device), device.startswith("cuda")
    size = CEILING_BYTES if on_gpu else CEILING_BYTES // 16
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    us = clock.event_us(copy) if on_gpu else clock.queue_us(copy, calls=3, rounds=5, warm_up=1)
    return 2 * size / us / 1e3
