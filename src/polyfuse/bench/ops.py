"""Time of every op against the machine's own ceiling: what `polyfuse bench` measures.

Device time is that of a CUDA-graph replay of many calls, divided by their number; without a GPU it is wall time.
Host time is wall time per call over calls that are queued without waiting for the device.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import polyfuse
from polyfuse.configs import model_configs
from polyfuse.conformance import Case, device_name, make_inputs, place, versions
from polyfuse.conformance.cases import model_case
from polyfuse.dispatch import examine, registry
from polyfuse.dispatch._arrays import device_of
from polyfuse.spec import OPS, SpecError, bind

CEILING_BYTES = 2**31
PLAIN = {"gdn_in_proj": {"strategy": "sequential"}}  # attributes of what PyTorch does when nobody helps it


@dataclass(frozen=True)
class Row:
    """One case on one backend. Times are in microseconds per call, `fraction` is of the measured stream ceiling."""

    op: str
    model: str
    case: str
    backend: str
    device_us: float
    host_us: float
    gigabytes_per_s: float
    fraction: float
    eager_ratio: float
    compile_ratio: float | None


@dataclass
class Bench:
    """All rows of a run, with what they were measured on."""

    device: str
    ceiling_gb_s: float
    versions: dict[str, str]
    rows: list[Row]

    def write(self, folder: Path) -> Path:
        """Write the rows so far into a JSON file named after the device; returns its path."""
        return write_json(folder, "", self.device, asdict(self))


def write_json(folder: Path, prefix: str, device: str, data: object) -> Path:
    """Write data into a JSON file named after the device; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    name = device.split("(")[-1].rstrip(")").lower().removeprefix("nvidia ").replace(" ", "_")
    path = folder / f"{prefix}{name}.json"
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return path


def run_bench(
    ops: Sequence[str] = (),
    backends: Sequence[str] = (),
    device: str = "cpu",
    model: str | None = None,
    compiled: bool = True,
    on_row: Callable[[Bench, Row], None] | None = None,
) -> Bench:
    """Measure the bench cases of the model files.

    `ops` and `backends` default to all; PyTorch eager (and, with `compiled`, torch.compile of the same code) is
    always measured for the ratios. Raises `SpecError` for an unknown model.
    """
    configs = model_configs()
    if model is not None and model not in configs:
        raise SpecError(f"--model: expected one of {', '.join(configs)}, got {model!r}")
    ceiling = stream_ceiling(device)
    result = Bench(device_name(device), round(ceiling, 1), versions(), [])
    for name, config in configs.items():
        if model not in (None, name):
            continue
        for op, cases in config.bench.items():
            if ops and op not in ops:
                continue
            for case in cases:
                for row in _measure(op, name, model_case(name, case), backends, device, ceiling, compiled):
                    result.rows.append(row)
                    if on_row:
                        on_row(result, row)
    return result


def _measure(
    op: str, model: str, case: Case, backends: Sequence[str], device: str, ceiling: float, compiled: bool
) -> Iterator[Row]:
    values = make_inputs(OPS[op], case)
    call = bind(OPS[op], values)
    cost = OPS[op].cost(call)
    moved = cost.bytes_read + cost.bytes_written
    eager, compile_us = _baseline(op, values, device, compiled)
    for name in backends or registry().names():
        backend = registry().get(name)
        if backend.family == "numpy":
            continue
        arrays = place(values, backend.family, device)
        where = device_of(next(a for a in arrays.values() if hasattr(a, "dtype")), backend.family)
        _, implementation = examine(op, name, call, backend.family, where, False)
        if implementation is None or where.kind in implementation.capability.interpreted:
            continue
        with torch.no_grad():
            device_us, host_us = _time(partial(getattr(polyfuse, op), **arrays, backend=name), backend.family, device)
        yield Row(
            op,
            model,
            case.name.removeprefix(f"{model}-"),
            name,
            round(device_us, 3),
            round(host_us, 2),
            round(moved / device_us / 1e3, 1),
            round(moved / device_us / 1e3 / ceiling, 4),
            round(eager / device_us, 3),
            round(compile_us / device_us, 3) if compile_us else None,
        )


def _baseline(op: str, values: dict[str, Any], device: str, compiled: bool) -> tuple[float, float | None]:
    """Device microseconds of PyTorch's own way, eager and (if asked for) under torch.compile."""
    arrays = place(values, "torch", device) | PLAIN.get(op, {})
    with torch.no_grad():
        eager = _time(partial(getattr(polyfuse, op), **arrays, backend="torch"), "torch", device)[0]
        if not compiled:
            return eager, None
        torch._dynamo.reset()
        function = torch.compile(registry().get("torch").load(op).function)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dynamo's advice on code that is compiled for comparison only
            return eager, _time(partial(function, **arrays), "torch", device)[0]


def _time(function: Callable[[], Any], family: str, device: str) -> tuple[float, float]:
    """(device, host) microseconds per call."""
    if family == "jax":
        return _time_jax(function)
    for _ in range(3):
        function()
    if not device.startswith("cuda"):
        wall = _wall(function, lambda: None)
        return wall, wall
    with _quiet_stream():
        device_us = _graph_replay(function)
    return device_us, _wall(function, torch.cuda.synchronize)


def _time_jax(function: Callable[[], Any]) -> tuple[float, float]:
    import jax

    jax.block_until_ready(function())
    rounds = []
    for _ in range(7):
        started = time.perf_counter()
        results = [function() for _ in range(20)]
        queued = time.perf_counter()
        jax.block_until_ready(results)
        rounds.append((time.perf_counter() - started, queued - started))
    return median(r[0] for r in rounds) * 1e6 / 20, median(r[1] for r in rounds) * 1e6 / 20


def _wall(function: Callable[[], Any], wait: Callable[[], None], calls: int = 50, rounds: int = 9) -> float:
    times = []
    for _ in range(rounds):
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - started) / calls)
        wait()
    return median(times) * 1e6


@contextmanager
def _quiet_stream() -> Iterator[None]:
    """A stream of its own, as capture needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _graph_replay(function: Callable[[], Any], rounds: int = 15) -> float:
    """Microseconds per call of a captured run of calls, whose results are dropped one by one."""
    function()
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    once = time.perf_counter() - started
    calls = max(4, min(200, int(0.004 / once)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(calls):
            function()
    return _events(graph.replay, rounds) / calls


def _events(function: Callable[[], Any], rounds: int) -> float:
    """Median device microseconds of a call."""
    times = []
    function()
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return median(times)


def stream_ceiling(device: str) -> float:
    """Gigabytes per second of a large copy on the device, read and written bytes both counted."""
    size = CEILING_BYTES if device.startswith("cuda") else CEILING_BYTES // 16
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    us = _events(copy, 15) if device.startswith("cuda") else _wall(copy, lambda: None, calls=3, rounds=5)
    return 2 * size / us / 1e3
