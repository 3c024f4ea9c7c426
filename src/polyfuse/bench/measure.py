"""The times of one call: warm and cold on the device, and of the host."""

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from polyfuse.bench.timing import Call, Clock, jax_us
from polyfuse.reference._quantiser import Quantiser, valid_rows

COPIES, COPIED_BYTES = 32, 2**29  # of the inputs of a call that is to find none of them in a cache


class Times(NamedTuple):
    """Microseconds per call. Warm ones are of calls in a row on the same inputs; cold is None where it is not taken."""

    device_us: float
    host_us: float
    cold_us: float | None
    captured: bool = True


def measure(make: Callable[[Mapping[str, Any]], Call], arrays: Mapping[str, Any], device: str, seconds: float) -> Times:
    """The times of what `make` makes of arguments whose arrays are torch's, within that many seconds, about."""
    clock = Clock(device, seconds / 2)
    function = make(arrays)
    if not device.startswith("cuda"):
        wall_us = clock.queue_us(function)
        return Times(wall_us, wall_us, clock.cold_us([function]))
    functions = [function, *map(make, _copies(arrays))]
    host_us = clock.queue_us(function)
    try:
        return Times(clock.replay_us(function), host_us, clock.cold_us(functions))
    except RuntimeError:  # what reads a result back on the host cannot be captured
        torch.cuda.synchronize()
        return Times(clock.event_us(function), host_us, None, captured=False)


def measure_jax(function: Call, seconds: float) -> Times:
    """The times of a JAX function, which are wall times."""
    return Times(*jax_us(function, seconds), None)


def live_share(values: Mapping[str, Any]) -> float:
    """The share of a call's rows that count: of experts there may be fewer than the arrays have."""
    if all(values.get(name) is None for name in ("num_rows", "expert_ends")):
        return 1.0
    return float(valid_rows(values["x"].shape[:-1], Quantiser.of(SimpleNamespace(**values))).mean())


def _copies(arrays: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Further copies of the arguments: many of small ones, one of large ones."""
    size = sum(a.numel() * a.element_size() for a in arrays.values() if isinstance(a, torch.Tensor))
    for _ in range(max(1, min(COPIES, COPIED_BYTES // max(size, 1))) - 1 or 1):
        yield {name: a.clone() if isinstance(a, torch.Tensor) else a for name, a in arrays.items()}
