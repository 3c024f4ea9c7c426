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


def _inner_transposed(values: Array) -> Array:
    """The last two dimensions in reverse order in memory."""
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


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "contiguous": np.ascontiguousarray,
    "row_strided": _row_strided,
    "column_strided": _column_strided,
    "token_stride_1": _column_strided,
    "inner_transposed": _inner_transposed,
    "one_of_three": _one_of_three,
    "first_half": _half(0),
    "second_half": _half(1),
}
