"""The oracle of `rms_norm_block_quant`; the formula is the docstring of `polyfuse.spec.rms_norm_block_quant`."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from polyfuse.reference._numerics import F64, Array, Exact, may_flush, numpy_dtype, round_to, to_f64
from polyfuse.reference._oracle import Error, Oracle
from polyfuse.reference._quantiser import Interval, Quantiser, or_nan, quantise, store, valid_rows
from polyfuse.reference._quantiser import bounds as quantised_bounds
from polyfuse.reference.gated_rms_norm import factor, inverse_rms, weighted
from polyfuse.spec import Capability, dtype_name
from polyfuse.spec.rms_norm_block_quant import SPEC

CAPABILITY = Capability(devices=("cpu",))


def formula(
    x: Array,
    weight: Array,
    *,
    residual: Array | None,
    eps: float,
    weight_offset: float,
    **quantiser: Any,
) -> tuple[F64, F64, F64]:
    """q [..., Q], scale [R, G], or the bytes of a packed scale, and the sum [..., D]; 0 where nothing is written."""
    h = summed(x, residual)
    y = weighted(h * inverse_rms(h, eps), factor(weight, weight_offset))
    by = Quantiser(**quantiser)
    total = np.where(valid_rows(h.shape[:-1], by), h, 0.0)
    return *quantise(y, by), total if residual is not None else np.zeros((0, h.shape[-1]))


def summed(x: Array, residual: Array | None) -> F64:
    """x + residual, rounded to the dtype of x."""
    return to_f64(x) if residual is None else to_f64(round_to(to_f64(x) + to_f64(residual), dtype_name(x.dtype)))


def bounds(exact: Mapping[str, F64], given: Any, error: Error) -> dict[str, Exact]:
    """A relative error of |y|, through the largest |y| to scale, and of both to q."""
    h = summed(given.x, given.residual)
    inverse, factors = inverse_rms(h, given.eps), factor(given.weight, given.weight_offset)
    y = weighted(h * inverse, factors)
    relative, flush = error("y")
    other = 1 + np.abs(h * inverse) + (1 + inverse) * np.abs(factors) + np.abs(y) * inverse**2
    slack = relative * np.abs(y) + flush * other
    slack = np.where(np.isfinite(y), np.where(np.isfinite(slack), slack, np.inf), 0.0)
    # An infinite factor meets a number that may count as 0: NaN and infinity are both right.
    either = np.isinf(factors) & (may_flush(h) | may_flush(h * inverse))
    if given.residual is None:
        found = quantised_bounds(or_nan(Interval(y, y - slack, y + slack), either), given, error)
        return found | {"sum": Exact.around(exact["sum"], exact["sum"])}
    # A sum in float32 that is then rounded to fewer bits has been rounded twice: h may be the next number.
    wide = to_f64(given.x) + to_f64(given.residual)
    roundoff, flushed = error("sum")
    twice = np.where(np.isfinite(wide), roundoff * np.abs(wide) + flushed, 0.0)
    dtype = dtype_name(given.x.dtype)
    most = np.where(np.isfinite(h), float(ml_dtypes.finfo(numpy_dtype(dtype)).max), np.inf)
    low, high = (to_f64(round_to(np.clip(end, -most, most), dtype)) for end in (wide - twice, wide + twice))
    other_h = np.where(low == high, 0.0, high - low) * inverse * np.abs(factors)
    slack = slack + np.where(np.isfinite(y), other_h, 0.0)
    found = quantised_bounds(or_nan(Interval(y, y - slack, y + slack), either), given, error)
    valid = valid_rows(h.shape[:-1], Quantiser.of(given))
    ends = np.where(valid, wide - twice, -np.inf), np.where(valid, wide + twice, np.inf)
    return found | {"sum": Exact(np.where(valid, wide, exact["sum"]), *ends)}


rms_norm_block_quant = Oracle(SPEC, formula, bounds, store)
