"""A second call: on the same rows many times over, every repetition must be the first one, bit for bit."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from polyfuse.conformance.checks.values import as_tuple
from polyfuse.dispatch import family_of
from polyfuse.spec import Call


def check_repeated_rows(
    run: Callable[[dict[str, Any]], Any], call: Call, arrays: Mapping[str, Any], result: Any, times: int
) -> str | None:
    """Which repetition of the rows differs from `result`, which the oracle has passed, or None."""
    grown = dict(arrays)
    for tensor in call.op.tensors:
        value = arrays[tensor.name]
        if tensor.shape[0] == call.op.rows and value is not None:
            grown[tensor.name] = value * times if isinstance(value, tuple) else _repeated(value, times)
    large = run(grown)
    for want, one, many in zip(call.outputs, as_tuple(result), as_tuple(large), strict=False):
        for i in range(times):
            if not _equal_bits(many[i * len(one) : (i + 1) * len(one)], one):
                return f"{want.name}: repetition {i} of {times} differs from the first run"
    return None


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
