"""What lies around the arrays: it is neither read nor written, wherever and however the arrays begin."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.checks.values import verdict
from polyfuse.dispatch import family_of

PROVES = (
    "Arrays inside of larger buffers, at another offset, give right values whatever surrounds them and whatever fresh "
    "memory holds, and nothing around the inputs and the results that the backend allocates by PyTorch is written."
)

MARGIN = 24  # elements before and behind an array; it begins at no multiple of 16 bytes
AROUND = {0xFF: "NaN", 0x7B: "large numbers"}  # by the byte that is repeated; integers are -1 and large


def check(attempt: Attempt) -> Iterator[str]:
    """What has been read or written outside of the arrays."""
    if attempt.family != "torch" or attempt.case.repeat > 1:
        return
    for pattern in AROUND:
        buffers: dict[str, Any] = {}
        arrays = attempt.place()
        for name, value in arrays.items():
            if family_of(value) == "torch" and value.numel() and name not in attempt.case.stacked:
                arrays[name], buffers[name] = _surrounded(value, pattern)
        with _guarded(pattern) as allocated:
            outputs = attempt.run(arrays)
        problem = verdict(attempt.results(arrays, outputs), attempt.call, attempt.exact)
        if problem:
            yield f"{AROUND[pattern]} around the arrays and in fresh memory: {problem}"
        for name, (buffer, used) in buffers.items():
            if not _is_untouched(buffer, used, pattern):
                yield f"{name}: the backend wrote beside its input"
        if any(not _is_untouched(buffer, used, pattern) for buffer, used in allocated):
            yield "the backend wrote beside memory that it has allocated, such as a result"


def _surrounded(value: Any, pattern: int) -> tuple[Any, tuple[Any, Any]]:
    """The same tensor with the same strides inside of a larger buffer; that buffer, and which of its elements it is."""
    import torch

    last = sum(step * (size - 1) for step, size in zip(value.stride(), value.shape, strict=True))
    buffer = torch.empty(last + 1 + 2 * MARGIN + 1, dtype=value.dtype, device=value.device)
    buffer.view(torch.uint8).fill_(pattern)
    offset = MARGIN + 1
    inside = buffer.as_strided(value.shape, value.stride(), offset)
    used = torch.zeros(buffer.numel(), dtype=torch.bool, device=value.device)
    used.as_strided(value.shape, value.stride(), offset).fill_(True)
    inside.copy_(value) if all(value.stride()) or value.dim() == 0 else _fill_expanded(inside, value)
    return inside, (buffer, used)


def _fill_expanded(inside: Any, value: Any) -> None:
    """Copy a tensor of which some dimensions have no stride."""
    first = tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())
    inside[first].copy_(value[first])


def _is_untouched(buffer: Any, used: Any, pattern: int) -> bool:
    import torch

    around = buffer.view(torch.uint8).view(buffer.numel(), -1)[~used]
    return bool((around == pattern).all())


def _guarded(pattern: int) -> AbstractContextManager[Any]:
    """While this is entered, memory that is allocated without being filled lies inside of a larger, patterned buffer.

    It gives the list of these buffers. Only what asks PyTorch's dispatcher for memory is seen.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    empty = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.new_empty.default}
    empty |= {torch.ops.aten.empty_like.default, torch.ops.aten.new_empty_strided.default}

    class Guard(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.buffers: list[tuple[Any, Any]] = []

        def __enter__(self) -> Any:
            super().__enter__()  # type: ignore[no-untyped-call]
            return self.buffers

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if func not in empty or made.layout is not torch.strided or not made.numel() or made.device.type == "meta":
                return made
            last = sum(step * (size - 1) for step, size in zip(made.stride(), made.shape, strict=True))
            margin = -(-64 // made.element_size())  # a result begins where PyTorch's allocations do
            buffer = torch.empty(last + 1 + 2 * margin, dtype=made.dtype, device=made.device)
            buffer.view(torch.uint8).fill_(pattern)
            used = torch.zeros(buffer.numel(), dtype=torch.bool, device=made.device)
            used.as_strided(made.shape, made.stride(), margin).fill_(True)
            self.buffers.append((buffer, used))
            return buffer.as_strided(made.shape, made.stride(), margin)

    guard: AbstractContextManager[Any] = Guard()
    return guard
