"""Memory layouts of a case's arrays."""

from collections.abc import Callable

import numpy as np

from polyfuse.reference._numerics import Array


def _row_strided(values: Array) -> Array:
    """Rows with a gap of 8 elements behind each."""
    wide = np.zeros((*values.shape[:-1], values.shape[-1] + 8), values.dtype)
    wide[..., : values.shape[-1]] = values
    return wide[..., : values.shape[-1]]


def _column_strided(values: Array) -> Array:
    """Dimensions in reverse order in memory."""
    return np.ascontiguousarray(values.T).T


def _last_two_swapped(values: Array) -> Array:
    """The last two dimensions in the other order in memory, as states lie in some pools."""
    return np.ascontiguousarray(values.swapaxes(-1, -2)).swapaxes(-1, -2)


def _one_of_three(values: Array) -> Array:
    """Each row beside two others of its size, as q, k and v lie in one tensor."""
    wide = np.zeros((len(values), 3, *values.shape[1:]), values.dtype)
    wide[:, 1] = values
    return wide[:, 1]


def _half(number: int) -> Callable[[Array], Array]:
    """Half number 0 or 1 of rows that are twice as long; the other half is NaN, so that reading it shows."""

    def layout(values: Array) -> Array:
        width = values.shape[-1]
        wide = np.full((*values.shape[:-1], 2 * width), np.nan, values.dtype)
        half = wide[..., number * width : (number + 1) * width]
        half[...] = values
        return half

    return layout


def _sliced(values: Array) -> Array:
    """Every dimension between the first and the last is part of a longer one, of which the rest is NaN.

    No two dimensions then have strides that one longer dimension could have: such a part of the columns of a projection
    are the heads of one of the arrays in it.
    """
    first, *middle, last = values.shape
    wide = np.full((first, *(size + 3 for size in middle), last), np.nan, values.dtype)
    part = wide[(slice(None), *(slice(2, 2 + size) for size in middle))]
    part[...] = values
    return part


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "contiguous": lambda values: np.array(values, order="C"),  # of no dimensions too
    "row_strided": _row_strided,
    "column_strided": _column_strided,
    "token_stride_1": _column_strided,
    "last_two_swapped": _last_two_swapped,
    "one_of_three": _one_of_three,
    "first_half": _half(0),
    "second_half": _half(1),
    "sliced": _sliced,
}
