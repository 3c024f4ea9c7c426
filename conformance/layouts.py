"""Memory layouts of a case's arrays. What lies between and around the elements is NaN, so that reading it shows."""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from polyfuse.reference._numerics import Array


def _unread(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    """Memory that must not be read: NaN, or for integers a number that is no slot, row or count."""
    return np.full(shape, -(2**20) if dtype.kind == "i" else 1 if dtype.kind == "b" else np.nan, dtype)


def _part(wide: Array, values: Array, *where: slice) -> Array:
    """The values, written to that part of `wide`."""
    part = wide[where]
    part[...] = values
    return part


def _gap(elements: int) -> Callable[[Array], Array]:
    """Rows with so many elements between them."""

    def layout(values: Array) -> Array:
        *lead, last = values.shape
        return _part(_unread((*lead, last + elements), values.dtype), values, ..., slice(last))  # type: ignore[arg-type]

    return layout


def _every_other(values: Array) -> Array:
    """Neighbours in the last dimension two elements apart."""
    *lead, last = values.shape
    return _part(_unread((*lead, 2 * last), values.dtype), values, ..., slice(None, None, 2))  # type: ignore[arg-type]


def _column_strided(values: Array) -> Array:
    """Dimensions in reverse order in memory."""
    return np.ascontiguousarray(values.T).T


def _last_two_swapped(values: Array) -> Array:
    """The last two dimensions in the other order in memory, as states lie in some pools."""
    return np.ascontiguousarray(values.swapaxes(-1, -2)).swapaxes(-1, -2)


def _one_of_three(values: Array) -> Array:
    """Each row beside two others of its size, as q, k and v lie in one tensor."""
    wide = _unread((len(values), 3, *values.shape[1:]), values.dtype)
    wide[:, 1] = values
    return wide[:, 1]


def _half(number: int) -> Callable[[Array], Array]:
    """Half number 0 or 1 of rows that are twice as long."""

    def layout(values: Array) -> Array:
        *lead, last = values.shape
        half = slice(number * last, (number + 1) * last)
        return _part(_unread((*lead, 2 * last), values.dtype), values, ..., half)  # type: ignore[arg-type]

    return layout


def _sliced(values: Array) -> Array:
    """Every dimension between the first and the last is part of a longer one.

    No two dimensions then have strides that one longer dimension could have: such a part of the columns of a projection
    are the heads of one of the arrays in it.
    """
    if values.ndim < 2:
        return values
    first, *middle, last = values.shape
    wide = _unread((first, *(size + 3 for size in middle), last), values.dtype)
    return _part(wide, values, slice(None), *(slice(2, 2 + size) for size in middle))


def _behind(elements: int) -> Callable[[Array], Array]:
    """Contiguous, behind so many elements and before as many."""

    def layout(values: Array) -> Array:
        size = prod(values.shape)
        memory = _unread((size + 2 * elements,), values.dtype)
        return _part(memory, values.reshape(-1), slice(elements, elements + size)).reshape(values.shape)

    return layout


def _expanded(axis: int) -> Callable[[Array], Array]:
    """One dimension without a stride: every element along it is the first one, which changes the values."""

    def layout(values: Array) -> Array:
        if not values.size:
            return values
        first = np.ascontiguousarray(values.take([0], axis))
        return np.broadcast_to(first, values.shape)

    return layout


def owned(array: Any) -> tuple[slice, ...]:
    """Where an array's elements lie that have memory of their own: what is expanded is once there.

    What is written to them is written to every element.
    """
    strides = array.stride() if callable(getattr(array, "stride", None)) else array.strides
    return tuple(slice(0, 1) if step == 0 else slice(None) for step in strides)


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "contiguous": lambda values: np.array(values, order="C"),  # of no dimensions too
    "row_strided": _gap(8),
    "odd_strided": _gap(1),  # no two rows begin at addresses that are alike
    "every_other": _every_other,
    "column_strided": _column_strided,
    "token_stride_1": _column_strided,
    "last_two_swapped": _last_two_swapped,
    "one_of_three": _one_of_three,
    "first_half": _half(0),
    "second_half": _half(1),
    "sliced": _sliced,
    "offset": _behind(64),
    "misaligned": _behind(1),
    "expanded": _expanded(0),
    "expanded_last": _expanded(-1),
}
