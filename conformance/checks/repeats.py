"""A large call: on the same rows many times over, every repetition must be the first one, bit for bit."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from polyfuse.conformance.attempt import Attempt
from polyfuse.dispatch import family_of

PROVES = "A row's result does not depend on where it stands, also past 32-bit indices (cases that repeat their rows)."


def check(attempt: Attempt) -> Iterator[str]:
    """Which repetition of the rows differs from the first call's result, which the oracle has passed."""
    times, op = attempt.case.repeat, attempt.call.op
    if times == 1:
        return
    grown = dict(attempt.arrays)
    for tensor in op.tensors:
        value = grown[tensor.name]
        if tensor.shape[:1] == (op.rows,) and value is not None:
            grown[tensor.name] = value * times if isinstance(value, tuple) else _repeated(value, times)
    large = attempt.run(grown)
    for want, one, many in zip(attempt.call.outputs, attempt.outputs, large, strict=False):
        different = (i for i in range(times) if not _equal_bits(many[i * len(one) : (i + 1) * len(one)], one))
        first = next(different, None)
        if first is not None:
            yield f"{want.name}: repetition {first} of {times} differs from the first run"


def _repeated(value: Any, times: int) -> Any:
    """An array with its rows repeated as a whole, on its device."""
    counts = (times, *([1] * (value.ndim - 1)))
    if family_of(value) == "torch":
        return value.repeat(*counts)
    if family_of(value) == "numpy":
        return np.tile(value, counts)
    import jax.numpy as jnp

    return jnp.tile(value, counts)


def _equal_bits(one: Any, other: Any) -> bool:
    if family_of(one) == "torch" and one.element_size() == 1:
        import torch

        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return bool((one == other).all())
