"""Host time of the dispatcher: what `polyfuse bench dispatch` measures.

A backend that does nothing is preferred, and every signature has been seen before, as in a model's second step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import polyfuse
from polyfuse.bench.results import Results, device_name
from polyfuse.bench.timing import host_ns
from polyfuse.conformance import cases, make_inputs, place
from polyfuse.dispatch import Backend, Implementation, registry, use_backend
from polyfuse.spec import OPS, Capability


@dataclass(frozen=True)
class DispatchRow:
    """Nanoseconds per call of one op with `arrays` tensors, medians.

    `resolution_ns` is from the arguments to the chosen function; `call_ns` is the whole public call.
    """

    op: str
    arrays: int
    resolution_ns: float
    call_ns: float


@dataclass
class DispatchBench(Results):
    """The host time of every op that was measured."""

    rows: list[DispatchRow] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return "dispatch_"


class _Nothing(Backend):
    """A backend whose functions take any call and return None for every result."""

    def missing(self, op: str) -> None:
        return None

    def load(self, op: str) -> Implementation:
        results = (None,) * len(OPS[op].outputs)
        result = results if len(results) > 1 else None
        return Implementation(lambda *args, **attrs: result, Capability())


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
    return DispatchBench(device_name(device), rows)


def _measure(op: str, device: str) -> DispatchRow:
    values = place(make_inputs(OPS[op], cases(op)[0]), "torch", device)
    arrays = sum(isinstance(value, torch.Tensor) for value in values.values())
    call = partial(getattr(polyfuse, op), **values)
    return DispatchRow(op, arrays, host_ns(_resolution(op, values)), host_ns(call))


def _resolution(name: str, values: Mapping[str, Any]) -> Callable[[], Any]:
    """What the dispatcher does for a call before it calls the chosen function: the one use of its inner parts here."""
    from polyfuse.dispatch._plan import CALLS

    op = CALLS[name]
    args = tuple(values[parameter] for parameter in op.names)

    def resolve() -> Any:
        return op.plan(op.read(args), None, torch.is_grad_enabled())

    return resolve
