"""New tensors for results, by the shortest way that PyTorch has: the one that its compiled graphs take.

`torch.empty` passes through PyTorch's dispatcher, which takes two to three times as long. It is taken while somebody
wants to hear of it, by a `TorchDispatchMode`, and while deterministic algorithms are on, which fill new memory.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch._C import _accelerator_getDeviceIndex as current_device_index
from torch._C import _get_deterministic_algorithms as deterministic
from torch._C import _len_torch_dispatch_stack as listeners
from torch._C._dynamo import guards

_GUARDS: Any = guards
Shape = tuple[int, ...]
# Makes a tensor without values of a shape, strides and a dtype. It takes tuples, and no `torch.Size`.
Allocate = Callable[[Shape, Shape, torch.dtype], torch.Tensor]

_ON_CURRENT: dict[str, Any] = {
    "cpu": _GUARDS._empty_strided_cpu,
    "cuda": _GUARDS._empty_strided_cuda,
    "xpu": _GUARDS._empty_strided_xpu,
}


def allocator(device: torch.device) -> Allocate:
    """What makes new tensors on the device."""
    on_current, anywhere = _makers(device)
    index: int | None = device.index
    here = index is None or index == current_device_index()
    return on_current if here and not listeners() and not deterministic() else anywhere


@lru_cache(maxsize=64)
def _makers(device: torch.device) -> tuple[Allocate, Allocate]:
    """What makes tensors on the device while it is the current one, and at any time."""

    def anywhere(shape: Shape, strides: Shape, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    return _ON_CURRENT.get(device.type, anywhere), anywhere


def new(device: torch.device, *wanted: tuple[Shape, torch.dtype]) -> tuple[torch.Tensor, ...]:
    """Contiguous tensors without values, each of its shape and dtype."""
    make = allocator(device)
    return tuple([make(shape, contiguous_strides(shape), dtype) for shape, dtype in wanted])


@lru_cache(maxsize=4096)
def contiguous_strides(shape: Shape) -> Shape:
    """The strides of a contiguous tensor of this shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
