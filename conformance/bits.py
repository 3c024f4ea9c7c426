"""Results as bits: what differs between two calls that must give the same."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfuse.dispatch import to_numpy
from polyfuse.reference._numerics import HALF_BYTE, Array, Exact, parts_of, to_f64
from polyfuse.spec import Output


def snapshot(results: Sequence[Any]) -> list[Array]:
    """NumPy copies of the results of a call, which nothing that is written later changes."""
    return [np.array(to_numpy(x), order="C") for x in results]


def anything(exact: Exact) -> NDArray[np.bool_]:
    """Where every value of a result is right, as the op leaves its element unwritten or undefined."""
    return np.isneginf(exact.low) & np.isposinf(exact.high)


def differences(one: Array, two: Array, free: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Which elements of two arrays of one shape and dtype have different bits; every NaN counts as the same one.

    `free` are elements that may hold anything; where several numbers of a result are in an element, they are numbers.
    """
    one, two = _as(one, free), _as(two, free)
    unsigned = f"u{one.dtype.itemsize}"
    different = one.view(unsigned) != two.view(unsigned)
    if one.dtype.kind not in "iub" and different.any():
        with np.errstate(invalid="ignore"):
            different &= ~(np.isnan(to_f64(one)) & np.isnan(to_f64(two)))
    return different if free is None else different & ~free


def unequal(
    wanted: Sequence[Output], before: Sequence[Array], now: Sequence[Any], free: Sequence[Any] | None = None
) -> Iterator[str]:
    """Which results of a call are other bits than before, a line for each."""
    for i, (want, one, other) in enumerate(zip(wanted, before, now, strict=False)):
        two = to_numpy(other)
        if one.shape != two.shape or one.dtype != two.dtype:
            yield f"{want.name}: was {one.dtype} {list(one.shape)}, is {two.dtype} {list(two.shape)}"
            continue
        part = None if free is None else free[i]
        different = differences(one, two, part)
        count = int(different.sum())
        if count:
            at = tuple(int(n) for n in np.argwhere(different)[0])
            text = f"{want.name}: {count} of {different.size} elements have other bits"
            yield f"{text}; at {list(at)} {_shown(_as(one, part), _as(two, part), at)}"


def _as(array: Array, free: NDArray[np.bool_] | None) -> Array:
    """An array as the numbers for which `free` stands, in C order."""
    if free is None or free.shape == array.shape:
        return np.ascontiguousarray(array).reshape(array.shape)
    halves = free.shape[-1] > array.shape[-1] * array.itemsize  # not of all elements, as there may be none
    return parts_of(array, HALF_BYTE if halves else "uint8")


def _shown(one: Array, two: Array, at: tuple[int, ...]) -> str:
    was, now = one[at], two[at]
    if one.dtype.kind in "iub":
        return f"was {was}, is {now}"
    with np.errstate(invalid="ignore"):
        return f"was {float(was):.9g}, is {float(now):.9g}"
