"""Is an output right? It must lie between the rounded ends of the oracle's interval, element by element."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.bits import anything
from polyfuse.dispatch import to_numpy
from polyfuse.reference._numerics import F64, Exact, numpy_dtype, parts_of, to_f64
from polyfuse.spec import Call, dtype_name

PROVES = "Every element of every result lies in the oracle's interval."


@dataclass(frozen=True)
class Margin:
    """The largest error of a result as a share of what is granted there, and where that is.

    The error of an element is the least that a value before the last rounding has, if the rounding gives the element: 0
    for the right rounding of the exact value, 1 at an end of the interval. `at` is None if no element has an error.
    """

    share: float = 0.0
    at: tuple[int, ...] | None = None


def check(attempt: Attempt) -> Iterator[str]:
    """What is wrong with the number, the dtypes, the shapes or the values of the first call's results."""
    yield from problems(attempt.results(attempt.arrays, attempt.outputs), attempt.call, attempt.exact)


def problems(results: Sequence[Any], call: Call, exact: Mapping[str, Exact]) -> Iterator[str]:
    """What is wrong with the number, the dtypes, the shapes or the values of a call's results, a line for each result.

    The updated arguments that are given come behind the outputs.
    """
    if len(results) != len(call.results):
        yield f"expected {len(call.results)} outputs, got {len(results)}"
        return
    for want, got in zip(call.results, results, strict=True):
        problem = compare(want.name, to_numpy(got), exact[want.name], want.dtype)
        if problem:
            yield problem


def verdict(results: Sequence[Any], call: Call, exact: Mapping[str, Exact]) -> str | None:
    """The `problems` in one line, or None."""
    return "; ".join(problems(results, call, exact)) or None


def margins(results: Sequence[Any], call: Call, exact: Mapping[str, Exact]) -> dict[str, Margin]:
    """The largest error of each result, by its name. The number, dtypes and shapes of the results are right."""
    return {
        want.name: margin(to_numpy(got), exact[want.name], want.dtype)
        for want, got in zip(call.results, results, strict=True)
    }


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
    got, dtype = _numbers(got, exact, dtype)
    if got.shape != exact.value.shape:
        return f"{name}: expected shape {list(exact.value.shape)}, got {list(got.shape)}"
    with np.errstate(invalid="ignore"):  # an element that is not written may be a signalling NaN
        value, result = exact.value, to_f64(got)
    low, high = exact.ends(dtype)
    with np.errstate(invalid="ignore"):
        right = (np.isnan(value) & np.isnan(result)) | ((result >= low) & (result <= high))
    in_bits = np.full(value.shape, exact.bits) if exact.kept is None else exact.kept | exact.bits
    signed = right & in_bits & (np.signbit(result) != np.signbit(value))
    wrong = (~right | signed) & ~anything(exact)
    count = int(wrong.sum())
    if not count:
        return None
    with np.errstate(invalid="ignore"):
        distance = np.where(wrong, np.abs(result - value), -1.0)
    distance = np.where(wrong & ~np.isfinite(distance) & ~signed, np.inf, distance)
    distance = np.where(wrong & signed, 0.0, distance)
    at = tuple(int(i) for i in np.unravel_index(np.argmax(distance), distance.shape))
    head = f"{name}: {count} of {got.size} elements wrong; at {list(at)} expected"
    if signed[at]:  # numbers would look the same
        return f"{head} {value[at]:.9g} with the sign {_sign(value[at])}, got the bits {bits(got[at])}"
    return f"{head} {low[at]:.9g} to {high[at]:.9g} (exact {value[at]:.9g}), got {result[at]:.9g}"


def margin(got: NDArray[Any], exact: Exact, dtype: str) -> Margin:
    """The largest error of a result of that dtype and of the right shape."""
    got, dtype = _numbers(got, exact, dtype)
    value = exact.value
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        result = to_f64(got)
        outward, inward = _half_steps(result, dtype)
        up, down = np.where(result >= 0, outward, inward), np.where(result >= 0, inward, outward)
        # What lies between these two is rounded to the result.
        least, greatest = np.where(np.isposinf(result), _overflow(dtype), result - down), result + up
        greatest = np.where(np.isneginf(result), -_overflow(dtype), greatest)
        error = np.maximum(np.maximum(least - value, value - greatest), 0.0)
        granted = np.where(value < least, exact.high - value, value - exact.low)
        share = np.where(error > 0, error / granted, 0.0)
    share = np.where(np.isfinite(value) & np.isfinite(granted), share, 0.0)
    if not share.size or not share.max() > 0:
        return Margin()
    at = np.unravel_index(np.argmax(share), share.shape)
    return Margin(float(share[at]), tuple(int(i) for i in at))


def bits(element: Any) -> str:
    """The bits of an array's element, as a hexadecimal number."""
    array = np.asarray(element)
    return f"0x{int(array.view(f'u{array.dtype.itemsize}')[()]):0{2 * array.dtype.itemsize}x}"


def _sign(value: float) -> str:
    return "-" if np.signbit(value) else "+"


def _numbers(got: NDArray[Any], exact: Exact, dtype: str) -> tuple[NDArray[Any], str]:
    """A result as the numbers that are compared, and the name of their dtype."""
    return (parts_of(got, exact.parts), exact.parts) if exact.parts else (got, dtype)


def _half_steps(result: F64, dtype: str) -> tuple[F64, F64]:
    """How far from an element of a dtype values still round to it: away from zero and towards zero."""
    target = numpy_dtype(dtype)
    if target.kind in "iub":
        half = np.full(result.shape, 0.5)
        return half, half
    info = ml_dtypes.finfo(target)
    magnitude = np.abs(np.where(np.isfinite(result), result, 0.0))

    def half_of(x: F64) -> F64:
        exponent = np.frexp(x)[1] - 1
        return np.ldexp(0.5, np.maximum(exponent, info.minexp) - info.nmant)

    return half_of(magnitude), half_of(np.nextafter(magnitude, 0.0))


def _overflow(dtype: str) -> float:
    """Where rounding to a dtype begins to give infinity."""
    target = numpy_dtype(dtype)
    if target.kind in "iub":
        return np.inf
    largest = float(ml_dtypes.finfo(target).max)
    return largest + float(_half_steps(np.array(largest), dtype)[0])
