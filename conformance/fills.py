"""Value distributions of a case's arrays. Those that only one op needs stand in its file in `conformance.ops`."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from polyfuse.reference._numerics import F64, numpy_dtype

# Of a random generator, a shape and a dtype's name: float64 values, which are then rounded to that dtype.
Fill = Callable[[np.random.Generator, tuple[int, ...], str], F64]


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Standard normal values."""
    return rng.standard_normal(shape)


def zeros(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Zeros."""
    return np.zeros(shape)


def scaled(scale: float) -> Fill:
    """Normal values of that standard deviation."""
    return lambda rng, shape, dtype: rng.standard_normal(shape) * scale


def sprinkled(*special: float) -> Fill:
    """Normal values, of which one in fifty is special."""

    def fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
        values = rng.standard_normal(shape)
        where = rng.random(shape) < 0.02
        values[where] = rng.choice(special, size=int(where.sum()))
        return values

    return fill


def integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Integers from -8 to 8: short sums of their products are exact in float32."""
    return rng.integers(-8, 9, shape).astype(np.float64)


def huge(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Up to a quarter of the largest finite value: sums of signed weights stay finite in fp32."""
    return rng.uniform(-1, 1, shape) * float(ml_dtypes.finfo(numpy_dtype(dtype)).max) / 4


def subnormal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Values below the least normal number of the dtype."""
    return rng.uniform(-1, 1, shape) * float(ml_dtypes.finfo(numpy_dtype(dtype)).tiny)


def wide_line(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Evenly spread over [-110, 110]: past where exp underflows and overflows in float32."""
    return np.linspace(-110, 110, int(np.prod(shape))).reshape(shape)


def one(value: float, usual: Fill = normal) -> Fill:
    """Values of another fill, of which one, anywhere, is `value`."""

    def fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
        values = usual(rng, shape, dtype)
        if values.size:
            values[np.unravel_index(rng.integers(values.size), shape)] = value
        return values

    return fill


def one_row(value: float, usual: Fill = normal) -> Fill:
    """Values of another fill, of which one row of the first dimension is `value`."""

    def fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
        values = usual(rng, shape, dtype)
        if len(values):
            values[rng.integers(len(values))] = value
        return values

    return fill


def signed_zeros(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Zeros of either sign, and normal values among them."""
    return np.where(rng.random(shape) < 0.3, rng.standard_normal(shape), rng.choice([0.0, -0.0], shape))


def largest(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Normal values, of which one in ten is the largest finite value of the dtype, of either sign."""
    most = float(ml_dtypes.finfo(numpy_dtype(dtype)).max)
    return np.where(rng.random(shape) < 0.1, rng.choice([-most, most], shape), rng.standard_normal(shape))


def top(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """As `largest`, but not beyond 2**60: sums of products and of squares are float32 numbers."""
    most = min(float(ml_dtypes.finfo(numpy_dtype(dtype)).max), 2.0**60)
    return np.where(rng.random(shape) < 0.1, rng.choice([-most, most], shape), rng.standard_normal(shape))


def one_hot(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Zeros, but a 1 in each row of the last dimension."""
    values = np.zeros(shape)
    if values.size:
        np.put_along_axis(values, rng.integers(shape[-1], size=(*shape[:-1], 1)), 1.0, -1)
    return values


def odd_halves(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Odd multiples of a half up to 16: the product of two is midway between numbers of a narrower dtype, often."""
    return (2 * rng.integers(-16, 16, shape) + 1) / 2.0


def constant(value: float) -> Fill:
    """One value everywhere."""
    return lambda rng, shape, dtype: np.full(shape, value)


def row_counts(count: int) -> NDArray[np.int64]:
    """Rows per sequence or expert: 2, 0, 5, 3, 1, 6, 4, 2, ..."""
    return (5 * np.arange(count) + 2) % 7


def boundaries(times: int) -> Fill:
    """Where sequences of `row_counts` rows, each that many `times`, begin and end."""

    def fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
        return times * np.concatenate([[0.0], np.cumsum(row_counts(shape[0] - 1))])

    return fill


def arange(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """0, 1, 2, ...: as boundaries, sequences of one row each."""
    return np.arange(shape[0], dtype=np.float64)


FILLS: dict[str, Fill] = {
    "normal": normal,
    "zeros": zeros,
    "nan_some": sprinkled(np.nan),
    "nan_one": one(np.nan),
    "nan_row": one_row(np.nan),
    "inf_one": one(np.inf),
    "negative_inf_one": one(-np.inf),
    "signed_zeros": signed_zeros,
    "largest": largest,
    "top": top,
    "one_hot": one_hot,
    "equal": constant(0.75),
    "beyond": constant(1000.0),
    "below": constant(-3.0),
    "odd_halves": odd_halves,
    "inf_some": sprinkled(np.inf, -np.inf),
    "integers": integers,
    "huge": huge,
    "subnormal": subnormal,
    "large": scaled(200.0),
    "tiny": scaled(1e-6),
    "wide_line": wide_line,
    "cu_seqlens": boundaries(1),
    "cu_seqlens_x40": boundaries(40),
    "arange": arange,
}


def fill_named(name: str, own: dict[str, Fill]) -> Any:
    """A fill by its name: one of the op's own, or one that all ops share. Raises `ValueError` for another name."""
    found = own.get(name) or FILLS.get(name)
    if found is None:
        raise ValueError(f"fill: expected one of {', '.join([*own, *FILLS])}, got {name!r}")
    return found
