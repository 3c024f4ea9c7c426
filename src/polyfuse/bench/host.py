"""Host time of a call, and what it goes to: what `polyfuse bench host` measures.

Every kind of call has been seen before, as in a model's second step, and nothing waits for the device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import polyfuse
from polyfuse._torch.memory import allocator
from polyfuse.bench.results import Results, device_name
from polyfuse.bench.timing import host_ns
from polyfuse.conformance import cases, make_inputs, place
from polyfuse.dispatch import Backend, Implementation, registry, use_backend
from polyfuse.spec import OPS, Capability


@dataclass(frozen=True)
class HostRow:
    """Nanoseconds per call of one op with `arrays` tensors, medians.

    `resolution_ns` is from the arguments to the chosen function; `dispatch_ns` is the whole public call where that
    function does nothing. `allocation_ns` is for empty tensors like the results; `call_ns` is the whole public call of
    `backend`, None on a CPU, where it computes. What is left of it binds the arguments and starts the kernels.
    """

    op: str
    arrays: int
    resolution_ns: float
    dispatch_ns: float
    allocation_ns: float | None = None
    call_ns: float | None = None
    backend: str | None = None

    @property
    def launch_ns(self) -> float | None:
        """What is left of a call after the dispatcher and its results' memory."""
        if self.call_ns is None or self.allocation_ns is None:
            return None
        return self.call_ns - self.dispatch_ns - self.allocation_ns


@dataclass
class HostBench(Results):
    """The host time of every op that was measured."""

    rows: list[HostRow] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return "host_"


class _Nothing(Backend):
    """A backend whose functions take any call and return None for every result."""

    def missing(self, op: str) -> None:
        return None

    def load(self, op: str) -> Implementation:
        results = (None,) * len(OPS[op].outputs)
        result = results if len(results) > 1 else None
        return Implementation(lambda *args, **attrs: result, Capability())


def run_host_bench(ops: Sequence[str] = (), device: str = "cpu") -> HostBench:
    """Measure the first case in bfloat16 of each op, all ops by default, with tensors on `device` and no gradients.

    Each number is the median of many rounds of 100 calls. Ends with `polyfuse.refresh()`.
    """
    with torch.no_grad():
        calls = {op: _whole(op, device) for op in ops or OPS} if torch.device(device).type != "cpu" else {}
        backend = _Nothing("nothing", "torch", "nothing")
        registry().add(backend)
        try:
            with use_backend(backend.name):
                rows = [_measure(op, device, *calls.get(op, ())) for op in ops or OPS]
        finally:
            polyfuse.refresh()
    return HostBench(device_name(device), rows)


def _arguments(op: str, device: str) -> Mapping[str, Any]:
    case = next(case for case in cases(op) if {*case.dtypes.values()} - {"int32", "int64"} == {"bfloat16"})
    return place(make_inputs(OPS[op], case), "torch", device)


def _whole(op: str, device: str) -> tuple[float, float, str]:
    """The time for the results' memory and for a call, and the backend that is chosen for it."""
    values = _arguments(op, device)
    call = partial(getattr(polyfuse, op), **values)
    found = call()
    results = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]
    layouts = [((*x.shape,), x.stride(), x.dtype) for x in results]

    def allocate() -> None:
        make = allocator(results[0].device)
        for layout in layouts:
            make(*layout)

    wait = partial(torch.accelerator.synchronize, device) if torch.device(device).type != "cpu" else None
    return host_ns(allocate, after=wait), host_ns(call, after=wait), str(polyfuse.explain(op, **values).winner)


def _measure(op: str, device: str, *whole: Any) -> HostRow:
    values = _arguments(op, device)
    arrays = sum(isinstance(value, torch.Tensor) for value in values.values())
    call = partial(getattr(polyfuse, op), **values)
    return HostRow(op, arrays, host_ns(_resolution(op, values)), host_ns(call), *whole)


def _resolution(name: str, values: Mapping[str, Any]) -> Callable[[], Any]:
    """What the dispatcher does for a call before it calls the chosen function: the one use of its inner parts here."""
    from polyfuse.dispatch._plan import CALLS

    op = CALLS[name]
    args = tuple(values[parameter] for parameter in op.names)

    def resolve() -> Any:
        return op.plan(op.read(args), None, torch.is_grad_enabled())

    return resolve
