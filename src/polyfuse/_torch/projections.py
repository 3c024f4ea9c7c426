"""What both torch backends need to run two projections of one activation, but for the products themselves.

Two weights can be stacked, or seen or copied as one matrix, and a measured table says which strategy is the fastest.
"""

from functools import lru_cache
from typing import Any
from weakref import finalize

import torch

from polyfuse._torch.streams import streams_enabled
from polyfuse.configs import projection_strategies
from polyfuse.spec import Unsupported

Pair = tuple[torch.Tensor, torch.Tensor]
Bias = torch.Tensor | None

_merged: dict[tuple[Any, ...], torch.Tensor] = {}


def stack_weights(*weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copy weights [n_i, hidden] behind one another into one buffer; returns a view of it for each.

    `gdn_in_proj` runs such weights as one matrix without a further copy. Raises `ValueError` for weights of
    different widths, dtypes or devices.
    """
    if len({(w.shape[1:], w.dtype, w.device) for w in weights}) != 1:
        raise ValueError(f"expected weights of one width, dtype and device, got {[tuple(w.shape) for w in weights]}")
    return torch.cat([w.detach() for w in weights]).split([len(w) for w in weights])


def as_one_weight(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor | None:
    """Both weights as one [n1 + n2, hidden] view, if the second lies right behind the first in one storage."""
    step = first.stride(0)
    behind = (
        first.stride() == second.stride()
        and first.stride(1) == 1
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and second.storage_offset() == first.storage_offset() + len(first) * step
    )
    return first.as_strided((len(first) + len(second), first.shape[1]), (step, 1)) if behind else None


def one_weight(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Both weights as one [n1 + n2, hidden]: the view that `as_one_weight` finds, or a copy that is kept.

    Raises `Unsupported` if the copy would have to be made inside a graph capture.
    """
    view = as_one_weight(first, second)
    return _concatenated(first, second) if view is None else view


def one_bias(first: Bias, second: Bias, weights: Pair) -> Bias:
    """The biases of both weights as one [n1 + n2], with zeros for one that is missing; None if both are."""
    if first is None and second is None:
        return None
    parts = [
        _zeros(len(weight), weight.dtype, weight.device) if bias is None else bias
        for bias, weight in zip((first, second), weights, strict=True)
    ]
    return _concatenated(*parts)


def choose(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, available: tuple[str, ...]) -> str:
    """The fastest of the available strategies by the device's measured table; `sequential` for what it lacks.

    `merged` counts as available only for weights that need no copy, `parallel` only with streams and inside a
    graph capture: launched one by one, its events take the host longer than the device saves.
    """
    table = _table(x.device)
    ranges = table.get((w1.shape[1], len(w1), len(w2), str(x.dtype).removeprefix("torch."))) if table else None
    if not ranges:
        return "sequential"
    rows = x.numel() // max(x.shape[-1], 1)
    for limit, ranking in ranges:
        if limit is None or rows <= limit:
            for strategy in ranking:
                if strategy == "merged" and as_one_weight(w1, w2) is None:
                    continue
                if strategy == "parallel" and not (streams_enabled() and _capturing(x.device)):
                    continue
                if strategy in available:
                    return strategy
    return "sequential"


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=16)
def _table(device: torch.device) -> dict[tuple[int, int, int, str], tuple[tuple[int | None, tuple[str, ...]], ...]]:
    return projection_strategies(torch.cuda.get_device_name(device)) if device.type == "cuda" else {}


@lru_cache(maxsize=64)
def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(size, dtype=dtype, device=device)


def _concatenated(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The concatenation, made once per pair of tensors and again when one was written to."""
    key = tuple((id(t), t.data_ptr(), None if t.is_inference() else t._version) for t in (first, second))
    found = _merged.get(key)
    if found is None:
        if _capturing(first.device):
            raise Unsupported(
                "gdn_in_proj: strategy merged: a copy of the weights made inside a graph capture would be empty until "
                "the graph runs; try polyfuse.runtime.stack_weights, or one call before the capture"
            )
        found = _merged[key] = torch.cat([first.detach(), second.detach()])
        for tensor in (first, second):
            finalize(tensor, _merged.pop, key, None)
    return found
