"""The oracle of `silu_mul_block_quant`; the formula is the docstring of `polyfuse.spec.silu_mul_block_quant`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfuse.reference._numerics import F64, Exact, round_to, to_f64
from polyfuse.reference.gdn_post_conv import sigmoid
from polyfuse.spec import FP32_ROUNDOFF, FP32_TINY, Capability, dtype_name
from polyfuse.spec.silu_mul_block_quant import LEAST_DIVISOR, QMAX, SPEC, scale_floor, scale_strides

CAPABILITY = Capability(devices=("cpu",))

Array = NDArray[np.generic]


Interval = tuple[F64, F64, F64]  # an exact value, and the ends of what a right backend may have in its place


def _activation(x: F64, dtype: str, limit: float | None, materialize: bool, steps: float) -> Interval:
    """y [..., D], from x [..., 2*D]."""
    gate, up = np.split(x, 2, axis=-1)
    if limit is not None:
        limit = float(np.float32(limit))
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    sigma = sigmoid(gate)
    silu = gate * sigma
    if not materialize:
        y = silu * up
        y = np.where(np.abs(y) > np.finfo(np.float32).max, np.copysign(np.inf, y), y)
        error = steps * FP32_ROUNDOFF * np.abs(y) * (1 + np.abs(gate)) + FP32_TINY * (1 + 2 * np.abs(gate * up))
        error = np.where(np.isfinite(y), error, 0.0)
        return _flushed((y, y - error, y + error), gate, up, sigma)
    error = steps * FP32_ROUNDOFF * np.abs(silu) * (1 + np.abs(gate)) + FP32_TINY * (1 + 2 * np.abs(gate))
    error = np.where(np.isfinite(silu), error, 0.0)
    ends = [to_f64(round_to(to_f64(round_to(s, dtype)) * up, dtype)) for s in (silu, silu - error, silu + error)]
    return _flushed((ends[0], np.minimum(ends[1], ends[2]), np.maximum(ends[1], ends[2])), gate, up, sigma)


def _flushed(y: Interval, gate: F64, up: F64, sigma: F64) -> Interval:
    """`y`, as NaN or infinity where an infinite `up` meets a sigmoid or silu that may count as 0."""
    either = np.isinf(up) & (gate != 0) & (np.minimum(sigma, np.abs(gate * sigma)) < FP32_TINY)
    return np.where(either, np.nan, y[0]), np.where(either, np.inf, y[1]), np.where(either, np.inf, y[2])


def _scales(
    y: Interval, group: int, qmax: float, floor: float, ub: float | None, power_of_two: bool, reciprocal: bool
) -> Interval:
    """Scales [..., D / group] before they are stored."""
    value, low, high = (part.reshape(*part.shape[:-1], part.shape[-1] // group, group) for part in y)
    nearest = np.where((low <= 0) & (high >= 0), 0.0, np.minimum(np.abs(low), np.abs(high)))
    amax = np.abs(value).max(-1, initial=0.0)
    ends = [amax, nearest.max(-1, initial=0.0), np.maximum(np.abs(low), np.abs(high)).max(-1, initial=0.0)]
    # Rounded up to a power of two, an exact quotient must not be pushed over one.
    slack = (0.0, -2 * FP32_ROUNDOFF, 0.0 if power_of_two else 2 * FP32_ROUNDOFF)
    flush = (0.0, FP32_TINY, 0.0)
    scales = []
    for end, widen, least in zip(ends, slack, flush, strict=True):
        if reciprocal:  # one product, which no backend rounds in another way
            scale = to_f64(round_to(end * float(np.float32(1 / qmax)), "float32"))
        else:
            scale = end / qmax * (1 + widen)
        scale = np.where(scale < least, 0.0, scale)
        if ub is not None:
            scale = np.where(np.isfinite(amax), np.minimum(scale, float(np.float32(ub))), scale)
        scale = np.maximum(scale, floor)
        scales.append(power_of_two_above(scale) if power_of_two else scale)
    return scales[0], scales[1], scales[2]


def power_of_two_above(scale: F64) -> F64:
    """The least power of two that is at least `scale`; infinity and NaN stay."""
    mantissa, exponent = np.frexp(scale)
    return np.where(np.isfinite(scale), np.ldexp(1.0, exponent - (mantissa == 0.5)), scale)


def _quantised(y: Interval, scale: Interval, group: int, qmax: float, integer: bool) -> Exact:
    """q [..., D] before rounding."""
    s, s_low, s_high = (np.repeat(part, group, axis=-1) for part in scale)
    value = np.clip(y[0] / s, -qmax, qmax)
    low = y[1] / np.where(y[1] >= 0, s_high, s_low)
    high = y[2] / np.where(y[2] >= 0, s_low, s_high)
    slack = 3 * FP32_ROUNDOFF
    low, high = (np.clip(end + sign * slack * np.abs(end), -qmax, qmax) for end, sign in ((low, -1), (high, 1)))
    missing = 0.0 if integer else np.nan
    value, low, high = (np.where(np.isnan(part), missing, part) for part in (value, low, high))
    return Exact(value, low, high)


def _exponent_bytes(scale: F64) -> F64:
    """Biased exponents of powers of two, 255 for NaN and infinity, padded with 0 to a multiple of four."""
    _, exponent = np.frexp(np.where(np.isfinite(scale), scale, 1.0))
    biased = np.where(np.isfinite(scale), exponent - 1 + 127, 255).astype(np.float64)
    return np.pad(biased, [(0, 0)] * (biased.ndim - 1) + [(0, -biased.shape[-1] % 4)])


def exact(
    x: Array,
    *,
    num_rows: Array | None = None,
    group_size: int = 128,
    quant_dtype: str = "float8_e4m3fn",
    scale_format: str = "float32",
    scale_layout: str = "row_major",
    scale_ub: float | None = None,
    scale_min: float | None = None,
    limit: float | None = None,
    materialize: bool = False,
    reciprocal: bool = False,
) -> dict[str, Exact]:
    """The unrounded q and scale with their intervals; a packed scale as its bytes."""
    qmax, steps = QMAX[quant_dtype], SPEC.bound("q").steps({})
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        y = _activation(to_f64(x), dtype_name(x.dtype), limit, materialize, steps)
        floor = float(np.float32(scale_floor(quant_dtype, scale_min)))
        scale = _scales(y, group_size, qmax, floor, scale_ub, scale_format != "float32", reciprocal)
        least = float(np.float32(LEAST_DIVISOR)) if floor == 0 else floor
        divisor, smallest, largest = (np.maximum(part, least) for part in scale)
        q = _quantised(y, (divisor, smallest, largest), group_size, qmax, quant_dtype == "int8")
        packed = scale_format == "ue8m0_packed"
        value, low, high = map(_exponent_bytes, scale) if packed else scale
        results = {"q": q, "scale": Exact(value, low, high, as_bytes=packed)}
    if num_rows is not None:
        valid = (np.arange(x.shape[1]) < to_f64(num_rows)[:, None])[..., None]
        for name, result in results.items():
            low, high = np.where(valid, result.low, -np.inf), np.where(valid, result.high, np.inf)
            results[name] = Exact(np.where(valid, result.value, 0.0), low, high, as_bytes=result.as_bytes)
    return results


def silu_mul_block_quant(
    x: Array,
    *,
    num_rows: Array | None = None,
    group_size: int = 128,
    quant_dtype: str = "float8_e4m3fn",
    scale_format: str = "float32",
    scale_layout: str = "row_major",
    scale_ub: float | None = None,
    scale_min: float | None = None,
    limit: float | None = None,
    materialize: bool = False,
    reciprocal: bool = False,
) -> tuple[Any, Any]:
    """q and scale, each rounded once; rows past num_rows are zero."""
    results = exact(
        x,
        num_rows=num_rows,
        group_size=group_size,
        quant_dtype=quant_dtype,
        scale_format=scale_format,
        scale_layout=scale_layout,
        scale_ub=scale_ub,
        scale_min=scale_min,
        limit=limit,
        materialize=materialize,
        reciprocal=reciprocal,
    )
    q, scale = results["q"].value, results["scale"].value
    if scale_format == "ue8m0_packed":
        stored = round_to(scale, "uint8").view(np.int32)
    else:
        stored = round_to(scale, "float32")
    return round_to(q, quant_dtype), _laid_out(stored, scale_layout, num_rows is not None)


def _laid_out(scale: Array, layout: str, masked: bool) -> Array:
    strides = scale_strides(scale.shape[:-1], scale.shape[-1], layout, masked)
    if strides is None:
        return scale
    size = 1 + sum((n - 1) * s for n, s in zip(scale.shape, strides, strict=True)) if scale.size else 0
    buffer = np.zeros(size, scale.dtype)
    view = np.lib.stride_tricks.as_strided(buffer, scale.shape, [s * scale.itemsize for s in strides])
    view[...] = scale
    return view
