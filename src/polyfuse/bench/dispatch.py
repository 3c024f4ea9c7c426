"""Host time of the dispatcher: what `polyfuse bench dispatch` measures.

A backend that does nothing is preferred, and every signature has been seen before, as in a model's second step.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import polyfuse
from polyfuse.bench.ops import write_json
from polyfuse.conformance import cases, device_name, make_inputs, place, versions
from polyfuse.dispatch import Backend, Implementation, _plan, registry, use_backend
from polyfuse.spec import OPS, Capability

CALLS, ROUNDS = 100, 201  # a round is short, so that few are interrupted


@dataclass(frozen=True)
class DispatchRow:
    """Nanoseconds per call of one op with `arrays` tensors, medians.

    `resolution_ns` is from the arguments to the chosen function; `call_ns` is the whole public call.
    """

    op: str
    arrays: int
    resolution_ns: float
    call_ns: float


@dataclass(frozen=True)
class DispatchBench:
    """All rows of a run, with what they were measured on."""

    device: str
    versions: dict[str, str]
    rows: list[DispatchRow]

    def write(self, folder: Path) -> Path:
        """Write the rows into a JSON file named after the device; returns its path."""
        return write_json(folder, "dispatch_", self.device, asdict(self))


class _Nothing(Backend):
    """A backend whose functions take any call and return None."""

    def missing(self, op: str) -> None:
        return None

    def load(self, op: str) -> Implementation:
        return Implementation(lambda *args, **attrs: None, Capability())


def run_dispatch_bench(ops: Sequence[str] = (), device: str = "cpu") -> DispatchBench:
    """Measure the first case of each op's spec, all ops by default, with tensors on `device` and no gradients.

    Each number is the median of many rounds of 100 calls. Ends with `polyfuse.refresh()`.
    """
    backend = _Nothing("nothing", "torch", "nothing")
    registry().add(backend)
    try:
        with use_backend(backend.name), torch.no_grad():
            rows = [_measure(op, device) for op in ops or OPS]
    finally:
        polyfuse.refresh()
    return DispatchBench(device_name(device), versions(), rows)


def _measure(name: str, device: str) -> DispatchRow:
    op = _plan.CALLS[name]
    values = place(make_inputs(OPS[name], cases(name)[0]), "torch", device)
    args = tuple(values[parameter] for parameter in op.names)

    def resolve() -> Any:
        return op.plan(op.read(args), None, torch.is_grad_enabled())

    arrays = sum(isinstance(value, torch.Tensor) for value in args)
    call = partial(getattr(polyfuse, name), **values)
    return DispatchRow(name, arrays, _median_ns(resolve), _median_ns(call))


def _median_ns(function: Callable[[], Any]) -> float:
    function()
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter_ns()
        for _ in range(CALLS):
            function()
        times.append((time.perf_counter_ns() - started) / CALLS)
    return round(median(times), 1)
