"""Time of every op against the machine's own ceiling: what `polyfuse bench` measures.

Device time is that of a CUDA-graph replay of many calls, divided by their number; without a GPU it is wall time.
Host time is wall time per call over calls that are queued without waiting for the device.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import polyfuse
from polyfuse.bench.results import Results, device_name
from polyfuse.bench.timing import Call, Clock, jax_us
from polyfuse.configs import model_configs
from polyfuse.conformance import Case, make_inputs, place
from polyfuse.conformance.cases import model_case
from polyfuse.dispatch import device_of, examine, registry
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
class Bench(Results):
    """The time of every op that was measured."""

    ceiling_gb_s: float
    rows: list[Row] = field(default_factory=list)


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
    result = Bench(device_name(device), round(ceiling, 1))
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


def _time(function: Call, family: str, device: str) -> tuple[float, float]:
    """Microseconds per call: of the device, and of the host."""
    if family == "jax":
        return jax_us(function)
    clock = Clock(device)
    if device.startswith("cuda"):
        return clock.replay_us(function), clock.queue_us(function)
    wall_us = clock.queue_us(function)
    return wall_us, wall_us


def stream_ceiling(device: str) -> float:
    """Gigabytes per second of a large copy on the device, read and written bytes both counted."""
    clock, on_gpu = Clock(device), device.startswith("cuda")
    size = CEILING_BYTES if on_gpu else CEILING_BYTES // 16
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    us = clock.event_us(copy) if on_gpu else clock.queue_us(copy, calls=3, rounds=5, warm_up=1)
    return 2 * size / us / 1e3
