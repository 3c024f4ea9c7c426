"""Later calls: nothing of one call stays for the next, and a result once given is the caller's own."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.bits import snapshot, unequal
from polyfuse.conformance.checks.values import problems
from polyfuse.conformance.layouts import owned
from polyfuse.conformance.other import Inputs
from polyfuse.dispatch import family_of

PROVES = (
    "A second call gives the same bits, also after the caller has written to the results of the first; a call after "
    "its inputs have changed in place gives what they are now; no call changes or shares results of an earlier one."
)

SCRIBBLE = 0xA5  # the byte that a caller leaves in every result


def check(attempt: Attempt) -> Iterator[str]:
    """What stays of a call in the next one."""
    if not attempt.single:
        return
    arrays = attempt.place()
    results = attempt.run(arrays)
    yield from _same(attempt, "a second call", attempt.results(arrays, results))
    if attempt.thorough and attempt.family != "jax":
        for result in results:
            _scribble(result)
        arrays = attempt.place()
        results = attempt.run(arrays)
        yield from _same(attempt, "after the results of a call were written to", attempt.results(arrays, results))
    kept = snapshot(results)
    other = attempt.other
    if other is not None:
        later = _overwritten(attempt, arrays, other)
        outputs = attempt.run(later)
        for problem in problems(attempt.results(later, outputs), other.call, other.exact):
            yield f"after the inputs have changed in place: {problem}"
        for problem in unequal(attempt.call.outputs, kept, results):
            yield f"a later call has changed the result of an earlier one: {problem}"
        yield from _shared(attempt, results, outputs)


def _same(attempt: Attempt, when: str, results: tuple[Any, ...]) -> Iterator[str]:
    for problem in unequal(attempt.call.results, attempt.first, results, attempt.free):
        yield f"{when}: {problem}"


def _shared(attempt: Attempt, earlier: tuple[Any, ...], later: tuple[Any, ...]) -> Iterator[str]:
    """Which results of two calls, both of which the caller still holds, lie in one memory."""
    for want, one, two in zip(attempt.call.outputs, earlier, later, strict=False):
        if family_of(one) == family_of(two) == "torch" and one.numel():
            if one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr():
                yield f"{want.name}: the results of two calls share memory"
        elif isinstance(one, np.ndarray) and isinstance(two, np.ndarray) and one.size and np.may_share_memory(one, two):
            yield f"{want.name}: the results of two calls share memory"


def _scribble(result: Any) -> None:
    """Write to every element of a result, as its owner may."""
    if family_of(result) == "torch" and result.numel():
        import torch

        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[result.element_size()]
        result.detach().view(bits).fill_(SCRIBBLE if result.element_size() == 1 else 0x2525)
    elif isinstance(result, np.ndarray) and result.flags.writeable:
        result[...] = result.dtype.type(0x25)


def _overwritten(attempt: Attempt, arrays: dict[str, Any], other: Inputs) -> dict[str, Any]:
    """The arguments with other values in the same memory; where arrays cannot be written, in others of the same kind.

    It is written as NumPy views and fused optimizers do: PyTorch's counters of versions see nothing of it.
    """
    fresh = attempt.place(other.made)
    if attempt.family == "jax":
        return fresh
    for name, value in other.made.items():
        if isinstance(value, np.ndarray):
            old, new = arrays[name], fresh[name]
            own = owned(old)  # elements that share memory are alike in the new values too
            if attempt.family == "torch":
                old.data[own].copy_(new[own])
            else:
                old[own] = new[own]
            fresh[name] = old
    return fresh
