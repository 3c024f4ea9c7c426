"""What a call does to its inputs: only the updated ones are written."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.bits import differences
from polyfuse.conformance.checks.values import bits
from polyfuse.dispatch import family_of, to_numpy

PROVES = "No input is written, not even for a while, or changed in its shape but the arguments that the op updates."


def check(attempt: Attempt) -> Iterator[str]:
    """Which input has been written, and where."""
    _ = attempt.outputs
    for name, value in attempt.made.items():
        if isinstance(value, np.ndarray) and name not in attempt.in_place:
            now = to_numpy(attempt.arrays[name])
            if now.shape != value.shape:
                shapes = f"from {list(value.shape)} to {list(now.shape)}"
                yield f"{name}: the backend changed the shape of its input {shapes}"
            elif value.tobytes() != now.astype(value.dtype, copy=False).tobytes():
                yield f"{name}: the backend wrote to its input: {_where(value, now.astype(value.dtype, copy=False))}"
    if attempt.family == "torch" and attempt.single and attempt.thorough:
        yield from _watched(attempt)


def _where(before: Any, now: Any) -> str:
    different = differences(before, now)
    if not different.any():
        different = np.isnan(now.astype(np.float64))  # one NaN for another
    at = tuple(int(n) for n in np.argwhere(different)[0])
    text = f"{int(different.sum())} of {different.size} elements; at {list(at)} was {before[at]}, is {now[at]}"
    return text if f"{before[at]}" != f"{now[at]}" else f"{text} (bits {bits(before[at])} and {bits(now[at])})"


def _watched(attempt: Attempt) -> Iterator[str]:
    """What PyTorch counts: an input that was written and restored, or that is another view or needs a gradient now."""
    arrays = attempt.place()
    inputs = {n: x for n, x in arrays.items() if family_of(x) == "torch" and n not in attempt.in_place}
    before = {name: (x._version, x.shape, x.stride(), x.data_ptr(), x.requires_grad) for name, x in inputs.items()}
    attempt.run(arrays)
    for name, x in inputs.items():
        if x._version != before[name][0]:
            yield f"{name}: the backend wrote to its input, whatever it holds now"
        if (x.shape, x.stride(), x.data_ptr(), x.requires_grad) != before[name][1:]:
            yield f"{name}: the backend changed the shape, the strides, the memory or the gradient of its input"
