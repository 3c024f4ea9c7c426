"""Exact rounding of float64 values onto low-precision grids, and the interval of a right result."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from polyfuse.spec import FP32_TINY

F64 = NDArray[np.float64]
Array = NDArray[Any]

HALF_BYTE = "float4_e2m1fn"  # the dtype of which a byte holds two numbers

FP32_MAX = float(np.finfo(np.float32).max)

BLOCK = 2**15  # numbers that are rounded together: what is made of them on the way stays in a cache


@dataclass(frozen=True)
class Exact:
    """An output before its last rounding: the exact value, and the interval a right backend's value lies in.

    Where `low` is -inf and `high` is +inf anything is right, NaN too: an element the op leaves unwritten.
    `bits` asks for the sign of zero too: the output is a copy. Where an element of the output holds several numbers,
    `parts` is the dtype of those, and they are what is compared (see `parts_of`). `kept` marks elements whose sign
    counts too, as those of an updated argument that a call must leave as they are.
    """

    value: F64
    low: F64
    high: F64
    bits: bool = False
    parts: str = ""
    kept: NDArray[np.bool_] | None = None

    @classmethod
    def around(cls, value: F64, error: F64) -> "Exact":
        """The interval `value +- error`; infinities and NaN stand for themselves."""
        error = np.where(np.isfinite(value), error, 0.0)
        return cls(value, value - error, value + error)

    @classmethod
    def copy(cls, value: F64, relative: float) -> "Exact":
        """A copy, whose bound grants a relative error of 0."""
        return cls.around(value, relative * np.abs(value)) if relative else cls(value, value, value, bits=True)

    def widened(self, relative: float) -> "Exact":
        """The interval with a further relative error of the value on both sides."""
        if not relative:
            return self
        error = np.where(np.isfinite(self.value), relative * np.abs(self.value), 0.0)
        return Exact(self.value, self.low - error, self.high + error)

    def ends(self, dtype: str) -> tuple[F64, F64]:
        """The ends of the interval as numbers of a dtype: rounded once, however many calls are compared with them."""
        if dtype not in self._ends:
            self._ends[dtype] = to_f64(round_to(self.low, dtype)), to_f64(round_to(self.high, dtype))
        return self._ends[dtype]

    @cached_property
    def _ends(self) -> dict[str, tuple[F64, F64]]:
        return {}


def to_f64(array: Array) -> F64:
    """Widen any float array (ml_dtypes ones too) to float64, exactly."""
    return np.asarray(array).astype(np.float64)


def may_flush(value: F64) -> Any:
    """Whether a number is not 0 and may count as 0."""
    return (value != 0) & (np.abs(value) < FP32_TINY)


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """The NumPy dtype of a dtype name, ml_dtypes included."""
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def round_to(value: F64, dtype: str) -> Array:
    """Round float64 to `dtype` once, to nearest even; past the largest finite value gives infinity, or the
    dtype's NaN if it has no infinity.

    NumPy and ml_dtypes cast float64 to bfloat16 through float32, which rounds twice.
    """
    target = numpy_dtype(dtype)
    if target.kind == "b":
        return value != 0
    if target.kind in "iu":
        limits = ml_dtypes.iinfo(target)
        return np.clip(np.rint(value), limits.min, limits.max).astype(target)
    if value.size <= BLOCK:
        return _rounded(value, target)
    flat, out = value.reshape(-1), np.empty(value.shape, target)
    parts = out.reshape(-1)
    for start in range(0, value.size, BLOCK):
        parts[start : start + BLOCK] = _rounded(flat[start : start + BLOCK], target)
    return out


def _rounded(value: F64, target: np.dtype[np.generic]) -> Array:
    """`round_to` for a float dtype."""
    info = ml_dtypes.finfo(target)
    _, exponent = np.frexp(np.where(np.isfinite(value), value, 0.0))
    # frexp gives |value| in [2**(exponent-1), 2**exponent); the grid there has step 2**(exponent-1-nmant).
    step = np.ldexp(1.0, np.maximum(exponent - 1, info.minexp) - info.nmant)
    with np.errstate(invalid="ignore", over="ignore"):
        rounded = np.rint(value / step) * step
        rounded = np.where(np.abs(rounded) > float(info.max), np.copysign(np.inf, rounded), rounded)
        return np.where(np.isnan(value), np.nan, rounded).astype(target)


def parts_of(array: Array, dtype: str) -> Array:
    """The numbers that an array's elements hold, behind one another along its last dimension.

    Numbers of float4_e2m1fn are the halves of bytes, the low one first; those of other dtypes are views.
    """
    data = np.ascontiguousarray(array)
    if dtype != HALF_BYTE:
        return data.view(numpy_dtype(dtype))
    data = data.view(np.uint8)
    return np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], 2 * data.shape[-1]).view(numpy_dtype(dtype))


def laid_out(array: Array, strides: tuple[int, ...] | None) -> Array:
    """An array with the given element strides, zero in between; contiguous if they are None. It may be the same one."""
    if strides is None:
        return np.asarray(array, order="C")
    size = 1 + sum((n - 1) * step for n, step in zip(array.shape, strides, strict=True)) if array.size else 0
    buffer = np.zeros(size, array.dtype)
    view = np.lib.stride_tricks.as_strided(buffer, array.shape, [step * array.itemsize for step in strides])
    view[...] = array
    return view
