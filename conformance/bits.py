"""Results as bits: what differs between two calls that must give the same."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfuse.dispatch import to_numpy
from polyfuse.reference._numerics import Array, Exact, to_f64
from polyfuse.spec import Output


def snapshot(results: Sequence[Any]) -> list[Array]:
    """NumPy copies of the results of a call, which nothing that is written later changes."""
    return [np.array(to_numpy(x), order="C") for x in results]


def anything(exact: Exact) -> NDArray[np.bool_]:
    """Where every value of a result is right, as the op leaves its element unwritten or undefined."""
    return np.isneginf(exact.low) & np.isposinf(exact.high)


def differences(one: Array, two: Array, free: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Which elements of two arrays of one shape and dtype have different bits; every NaN counts as the same one.

    `free` are elements that may hold anything; those of a result that is compared as bytes are bytes.
    """
    one, two = np.ascontiguousarray(one), np.ascontiguousarray(two)
    if free is not None and free.shape != one.shape:
        one, two = one.view(np.uint8), two.view(np.uint8)
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
        different = differences(one, two, None if free is None else free[i])
        count = int(different.sum())
        if count:
            at = tuple(int(n) for n in np.argwhere(different)[0])
            text = f"{want.name}: {count} of {different.size} elements have other bits"
            yield f"{text}; at {list(at)} {_shown(one, two, at)}"


def _shown(one: Array, two: Array, at: tuple[int, ...]) -> str:
    if len(at) != one.ndim or (one.shape[-1:] and at[-1] >= one.shape[-1]):
        one, two = one.view(np.uint8), two.view(np.uint8)
    was, now = one[at], two[at]
    if one.dtype.kind in "iub":
        return f"was {was}, is {now}"
    with np.errstate(invalid="ignore"):
        return f"was {float(was):.9g}, is {float(now):.9g}"
