"""What lies around the arrays: it is neither read nor written, wherever and however the arrays begin."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.bits import snapshot, unequal
from polyfuse.conformance.checks.values import problems
from polyfuse.conformance.layouts import owned
from polyfuse.dispatch import family_of

PROVES = (
    "Arrays inside of larger buffers, aligned and misaligned, give right values whatever surrounds them and whatever "
    "fresh memory holds, in the same bits; and nothing is written around the inputs, or around what the backend "
    "allocates by PyTorch."
)

AROUND = {0xFF: "NaN", 0x7B: "large numbers"}  # by the byte that is repeated; integers are -1 and large
ALIGNED, MISALIGNED = 64, 25  # elements before and behind an array: a multiple of 64 bytes, and no multiple of 16


def check(attempt: Attempt) -> Iterator[str]:
    """What has been read or written outside of the arrays."""
    if attempt.family != "torch" or not attempt.single:
        return
    before: list[Any] | None = None
    for pattern, margin in ((0xFF, ALIGNED), (0x7B, ALIGNED), (0xFF, MISALIGNED)):
        if margin == MISALIGNED and not attempt.thorough:
            return
        where = f"{AROUND[pattern]} around the {'' if margin == ALIGNED else 'misaligned '}arrays and in fresh memory"
        arrays, buffers = _surrounded_arrays(attempt, pattern, margin)
        with _guarded(pattern) as allocated:
            outputs = attempt.run(arrays)
        results = attempt.results(arrays, outputs)
        found = list(problems(results, attempt.call, attempt.exact))
        if before is not None and margin == ALIGNED and not found:
            found = list(unequal(attempt.call.results, before, results, attempt.free))
        yield from (f"{where}: {problem}" for problem in found)
        before = before or snapshot(results)
        for name, (buffer, used) in buffers.items():
            if not _is_untouched(buffer, used, pattern):
                yield f"{name}: the backend wrote beside this input"
        if any(not _is_untouched(buffer, used, pattern) for buffer, used in allocated):
            yield "the backend wrote beside memory that it has allocated, such as a result"


def _surrounded_arrays(attempt: Attempt, pattern: int, margin: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments inside of buffers; and of each buffer its memory and which of its elements are an argument's."""
    arrays: dict[str, Any] = attempt.place()
    buffers: dict[str, Any] = {}
    stacked = attempt.case.stacked
    for name, value in arrays.items():
        if family_of(value) == "torch" and value.numel() and name not in stacked:
            arrays[name], *buffers[name] = surrounded(value, pattern, margin)
    if stacked:  # one buffer of them all, in which they stay behind one another
        import torch

        parts = [arrays[name] for name in stacked]
        whole, *buffers[stacked[0]] = surrounded(torch.cat(parts), pattern, margin)
        arrays |= dict(zip(stacked, whole.split([len(part) for part in parts]), strict=True))
    return arrays, buffers


def surrounded(value: Any, pattern: int, margin: int, *, fresh: bool = False) -> tuple[Any, Any, Any]:
    """The same tensor with the same strides inside of a larger buffer; that buffer, and which of its elements it is.

    A `fresh` tensor has no values yet, and holds the pattern too.
    """
    import torch

    buffer = _patterned(value, pattern, margin)
    inside = buffer.as_strided(value.shape, value.stride(), margin)
    used = torch.zeros(buffer.numel(), dtype=torch.bool, device=value.device)
    used.as_strided(value.shape, value.stride(), margin).fill_(True)
    own = owned(value)
    if not fresh:
        inside[own].copy_(value[own])
    return inside, buffer, used


def _patterned(value: Any, pattern: int, margin: int) -> Any:
    """Memory for a tensor of that shape, dtype and strides, and the margin on both sides."""
    import torch

    last = sum(step * (size - 1) for step, size in zip(value.stride(), value.shape, strict=True))
    buffer = torch.empty(last + 1 + 2 * margin, dtype=value.dtype, device=value.device)
    buffer.view(torch.uint8).fill_(pattern)
    return buffer


def _is_untouched(buffer: Any, used: Any, pattern: int) -> bool:
    import torch

    around = buffer.view(torch.uint8).view(buffer.numel(), -1)[~used]
    return bool((around == pattern).all())


def _guarded(pattern: int) -> AbstractContextManager[Any]:
    """While this is entered, every tensor that PyTorch's dispatcher makes lies inside of a larger, patterned buffer.

    What is allocated without being filled holds the pattern too. It gives the list of the buffers.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map_only

    aten = torch.ops.aten
    empty = {aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default, aten.empty_like.default}
    empty |= {aten.new_empty_strided.default}

    class Guard(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.buffers: list[tuple[Any, Any]] = []

        def __enter__(self) -> Any:
            super().__enter__()  # type: ignore[no-untyped-call]
            return self.buffers

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            made = func(*args, **(kwargs or {}))
            given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}

            def guard(x: Any) -> Any:
                plain = x.layout is torch.strided and x.device.type != "meta" and x.numel() and type(x) is torch.Tensor
                if not plain or x.untyped_storage()._cdata in given:
                    return x
                inside, buffer, used = surrounded(x, pattern, ALIGNED, fresh=func in empty)
                self.buffers.append((buffer, used))
                return inside

            return tree_map_only(torch.Tensor, guard, made)

    guard: AbstractContextManager[Any] = Guard()
    return guard
