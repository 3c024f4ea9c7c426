"""Is an output right? It must lie between the rounded ends of the oracle's interval, element by element."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfuse.conformance.attempt import Attempt
from polyfuse.dispatch import to_numpy
from polyfuse.reference._numerics import Exact, round_to, to_f64
from polyfuse.spec import Call, dtype_name

PROVES = "Every element of every result lies in the oracle's interval."


def check(attempt: Attempt) -> Iterator[str]:
    """What is wrong with the number, the dtypes, the shapes or the values of the first call's results."""
    problem = verdict(attempt.results(attempt.arrays, attempt.outputs), attempt.call, attempt.exact)
    if problem:
        yield problem


def verdict(results: Sequence[Any], call: Call, exact: Mapping[str, Exact]) -> str | None:
    """What is wrong with the number, the dtypes, the shapes or the values of a call's results, or None.

    The updated arguments that are given come behind the outputs.
    """
    if len(results) != len(call.results):
        return f"expected {len(call.results)} outputs, got {len(results)}"
    for want, got in zip(call.results, results, strict=True):
        problem = compare(want.name, to_numpy(got), exact[want.name], want.dtype)
        if problem:
            return problem
    return None


def as_tuple(result: Any) -> tuple[Any, ...]:
    """The results of a call, also of an op that has one."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def compare(name: str, got: NDArray[Any], exact: Exact, dtype: str) -> str | None:
    """None if `got` is a right rounding of `exact`, else one line that says what differs most.

    NaN is right exactly where the exact value is NaN, infinity where the exact value or an end of its
    interval rounds to it.
    """
    if dtype_name(got.dtype) != dtype:
        return f"{name}: expected dtype {dtype}, got {dtype_name(got.dtype)}"
    if exact.as_bytes:
        got, dtype = np.ascontiguousarray(got).view(np.uint8), "uint8"
    if got.shape != exact.value.shape:
        return f"{name}: expected shape {list(exact.value.shape)}, got {list(got.shape)}"
    with np.errstate(invalid="ignore"):  # an element that is not written may be a signalling NaN
        value, result = exact.value, to_f64(got)
    low, high = to_f64(round_to(exact.low, dtype)), to_f64(round_to(exact.high, dtype))
    with np.errstate(invalid="ignore"):
        right = (np.isnan(value) & np.isnan(result)) | ((result >= low) & (result <= high))
    if exact.bits:
        right &= np.signbit(result) == np.signbit(value)
    if exact.kept is not None:
        right &= ~exact.kept | (np.signbit(result) == np.signbit(value))
    wrong = ~(right | (np.isneginf(exact.low) & np.isposinf(exact.high)))
    count = int(wrong.sum())
    if not count:
        return None
    with np.errstate(invalid="ignore"):
        distance = np.where(wrong, np.abs(result - value), -1.0)
    distance = np.where(wrong & ~np.isfinite(distance), np.inf, distance)
    at = tuple(int(i) for i in np.unravel_index(np.argmax(distance), distance.shape))
    return (
        f"{name}: {count} of {got.size} elements wrong; at {list(at)} expected {low[at]:.9g} to {high[at]:.9g} "
        f"(exact {value[at]:.9g}), got {result[at]:.9g}"
    )
