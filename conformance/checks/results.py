"""What kind of arrays the results are, and how they lie in memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from polyfuse.conformance.attempt import Attempt
from polyfuse.dispatch import family_of

PROVES = (
    "Results are arrays of the backend's kind on the inputs' device, contiguous or with the strides that the spec "
    "gives, without a gradient, and share memory with no input and no other result."
)


def check(attempt: Attempt) -> Iterator[str]:
    """Which result is another array than the spec says."""
    wanted = attempt.call.outputs if attempt.family == "torch" else attempt.call.results
    if attempt.single and attempt.thorough and len(wanted) == 1:
        returned = attempt.returned(attempt.place())
        if isinstance(returned, (tuple, list)):
            yield f"{wanted[0].name}: expected an array, got a {type(returned).__name__} with {len(returned)} in it"
    for want, got in zip(wanted, attempt.outputs, strict=False):
        kind = family_of(got)
        if kind != attempt.family:
            yield f"{want.name}: expected a {attempt.family} array, got {type(got).__module__}.{type(got).__name__}"
        elif kind == "torch":
            yield from _of_torch(want, got, attempt)
        elif kind == "numpy":
            yield from _of_numpy(want, got)
        elif getattr(got, "weak_type", False):
            yield f"{want.name}: has a weak dtype, which gives way to that of what it is combined with"
    yield from _shared(attempt, [want.name for want in wanted])


def _of_torch(want: Any, got: Any, attempt: Attempt) -> Iterator[str]:
    device = next(x.device for x in attempt.arrays.values() if family_of(x) == "torch")
    if type(got) is not type(got.data):
        yield f"{want.name}: expected a plain tensor, got {type(got).__name__}"
    if got.device != device:
        yield f"{want.name}: expected a tensor on {device}, got one on {got.device}"
    if got.requires_grad:
        yield f"{want.name}: requires a gradient, though no input does"
    if got.is_inference():
        yield f"{want.name}: is a tensor of inference mode, in which the call was not made"
    if got.is_conj() or got.is_neg():
        yield f"{want.name}: is a lazily changed view"
    strides = want.strides or _contiguous(got.shape)
    if want.name in _sliced(attempt) and got.dim() and got.stride(-1) == 1:
        return
    if got.numel() and _felt(got.stride(), got.shape) != _felt(strides, got.shape):
        yield f"{want.name}: expected strides {list(strides)}, got {list(got.stride())}"


def _of_numpy(want: Any, got: Any) -> Iterator[str]:
    strides = [step // got.itemsize for step in got.strides]
    expected = want.strides or _contiguous(got.shape)
    if got.size and _felt(strides, got.shape) != _felt(expected, got.shape):
        yield f"{want.name}: expected strides {list(expected)}, got {strides}"
    if not got.flags.writeable:
        yield f"{want.name}: cannot be written"


def _sliced(attempt: Attempt) -> set[str]:
    """The results that may lie beside one another in a buffer."""
    return {output.name for output in attempt.call.op.outputs if output.sliced}


def _contiguous(shape: Any) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return tuple(strides[: len(shape)])


def _felt(strides: Any, shape: Any) -> list[int]:
    """The strides that matter: those of dimensions with more than one element."""
    return [step for step, size in zip(strides, shape, strict=True) if size > 1]


def _shared(attempt: Attempt, names: list[str]) -> Iterator[str]:
    """Which results share memory with an input or another result. The memory of JAX's arrays is JAX's own affair."""
    if attempt.family == "jax":
        return
    inputs = {f"input {name}": x for name, x in attempt.arrays.items() if family_of(x) == attempt.family}
    outputs = dict(zip(names, attempt.outputs, strict=False))
    sliced = _sliced(attempt)
    for i, (name, x) in enumerate(outputs.items()):
        others = inputs | dict(list(outputs.items())[i + 1 :])
        for other, y in others.items():
            if not {name, other} <= sliced and family_of(x) == family_of(y) and _overlap(x, y):
                yield f"{name}: shares memory with {other}"


def _overlap(x: Any, y: Any) -> bool:
    """Whether two arrays lie in one memory, be it in different parts of it: a view keeps the whole alive."""
    if family_of(x) == "numpy":
        return bool(x.size and y.size and np.may_share_memory(x, y))
    if not x.numel() or not y.numel():
        return False
    return bool(x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr())
