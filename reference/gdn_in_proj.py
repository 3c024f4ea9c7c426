"""The oracle of `gdn_in_proj`; the formula is the docstring of `polyfuse.spec.gdn_in_proj`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from polyfuse.reference._numerics import F64, Array, Exact, may_flush, to_f64
from polyfuse.reference._oracle import Error, Oracle
from polyfuse.spec import Capability
from polyfuse.spec.gdn_in_proj import SPEC

CAPABILITY = Capability(devices=("cpu",))

EXACT_SUMS = 2.0**24  # integers up to here are float32 numbers


def formula(
    x: Array,
    w_qkvz: Array,
    w_ba: Array,
    *,
    w_z: Array | None,
    w_a: Array | None,
    bias_qkvz: Array | None,
    bias_ba: Array | None,
    strategy: str,
) -> tuple[F64, F64]:
    """qkvz [..., M1] and ba [..., M2]; the strategy changes nothing."""
    return linear(x, joined(w_qkvz, w_z), bias_qkvz), linear(x, joined(w_ba, w_a), bias_ba)


def joined(first: Array, following: Array | None) -> Array:
    """The rows of one weight, then those of the other."""
    return first if following is None else np.concatenate([first, following])


def linear(x: Array, weight: Array, bias: Array | None) -> F64:
    """x @ weight.T + bias."""
    product = to_f64(x) @ to_f64(weight).T
    return product if bias is None else product + to_f64(bias)


def bounds(exact: Mapping[str, F64], given: Any, error: Error) -> dict[str, Exact]:
    """The accumulator's error and that of the sum, each of its own magnitude; none for sums of integers."""
    operands = {
        "qkvz": (joined(given.w_qkvz, given.w_z), given.bias_qkvz),
        "ba": (joined(given.w_ba, given.w_a), given.bias_ba),
    }
    in_accumulator, _ = error("accumulator")
    results = {}
    for name, (weight, bias) in operands.items():
        in_sum, flush = error(name)
        magnitude = linear(np.abs(given.x), np.abs(weight), None if bias is None else np.abs(bias))
        allowed = in_accumulator * np.abs(exact[name]) + in_sum * magnitude
        allowed = allowed + flush * _flushed(to_f64(given.x), to_f64(weight))
        if all(_are_integers(array) for array in (given.x, weight, bias) if array is not None):
            allowed = np.where(magnitude < EXACT_SUMS, 0.0, allowed)
        result = Exact.around(exact[name], allowed)
        either = _zero_times_infinity(to_f64(given.x), to_f64(weight))
        results[name] = Exact(
            result.value, np.where(either, -np.inf, result.low), np.where(either, np.inf, result.high)
        )
    return results


def _flushed(x: F64, weight: F64) -> F64:
    """How often a flushed number counts: sum |x| and sum |weight| of each element, its products, and itself."""
    factors = [np.where(np.isfinite(part), np.abs(part), 0.0).sum(-1) for part in (x, weight)]
    return factors[0][..., None] + factors[1] + x.shape[-1] + 2


def _zero_times_infinity(x: F64, weight: F64) -> Any:
    """Whether an infinite factor of an element meets one that may count as 0: NaN and infinity are both right."""
    return (np.isinf(x) * 1.0 @ may_flush(weight).T + may_flush(x) * 1.0 @ np.isinf(weight).T) > 0


def _are_integers(array: Array) -> bool:
    values = to_f64(array)
    return bool(np.all(values == np.rint(values)))


gdn_in_proj = Oracle(SPEC, formula, bounds)
