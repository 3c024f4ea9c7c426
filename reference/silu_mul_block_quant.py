"""The oracle of `silu_mul_block_quant`; the formula is the docstring of `polyfuse.spec.silu_mul_block_quant`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from polyfuse.reference._numerics import F64, FP32_MAX, Array, Exact, may_flush, round_to, to_f64
from polyfuse.reference._oracle import Error, Oracle
from polyfuse.reference.gdn_post_conv import sigmoid
from polyfuse.spec import FP32_TINY, Capability, Output, dtype_name
from polyfuse.spec.silu_mul_block_quant import LEAST_DIVISOR, QMAX, SPEC, scale_floor

CAPABILITY = Capability(devices=("cpu",))


def formula(
    x: Array,
    *,
    up: Array | None,
    num_rows: Array | None,
    group_size: int,
    quant_dtype: str,
    scale_format: str,
    scale_layout: str,
    scale_ub: float | None,
    scale_min: float | None,
    limit: float | None,
    materialize: bool,
    reciprocal: bool,
) -> tuple[F64, F64]:
    """q [..., D] and scale [..., G], or the bytes of a packed scale; 0 in rows past num_rows."""
    gate, factor = gate_and_up(x, up, limit)
    y = gate * sigmoid(gate)
    if materialize:
        y = rounded(rounded(y, x) * factor, x)
    else:
        y = overflowed(y * factor)
    amax = np.abs(grouped(y, group_size)).max(-1, initial=0.0)
    scale = bounded_scale(raw_scale(amax, quant_dtype, reciprocal), amax, quant_dtype, scale_ub, scale_min)
    if scale_format != "float32":
        scale = power_of_two_above(scale)
    divisor = np.repeat(np.maximum(scale, least_divisor(quant_dtype, scale_min)), group_size, axis=-1)
    q = np.clip(y / divisor, -QMAX[quant_dtype], QMAX[quant_dtype])
    if quant_dtype == "int8":
        q = np.where(np.isnan(q), 0.0, q)
    stored = exponent_bytes(scale) if scale_format == "ue8m0_packed" else scale
    valid = valid_rows(x, num_rows)
    return np.where(valid, q, 0.0), np.where(valid, stored, 0.0)


def gate_and_up(x: Array, up: Array | None, limit: float | None) -> tuple[F64, F64]:
    """The halves of x, or x and up, clamped to the float32 nearest to the limit."""
    gate, factor = np.split(to_f64(x), 2, axis=-1) if up is None else (to_f64(x), to_f64(up))
    if limit is not None:
        limit = float(np.float32(limit))
        gate, factor = np.minimum(gate, limit), np.clip(factor, -limit, limit)
    return gate, factor


def rounded(value: F64, x: Array) -> F64:
    """`value` rounded to the dtype of x."""
    return to_f64(round_to(value, dtype_name(x.dtype)))


def overflowed(y: F64) -> F64:
    """`y`, infinite beyond float32."""
    return np.where(np.abs(y) > FP32_MAX, np.copysign(np.inf, y), y)


def grouped(y: F64, group_size: int) -> F64:
    """[..., D] as [..., D / group_size, group_size]."""
    return y.reshape(*y.shape[:-1], y.shape[-1] // group_size, group_size)


def raw_scale(amax: F64, quant_dtype: str, reciprocal: bool) -> F64:
    """amax / qmax, or the product with the reciprocal, rounded to float32 twice."""
    if reciprocal:
        return to_f64(round_to(amax * float(np.float32(1 / QMAX[quant_dtype])), "float32"))
    return amax / QMAX[quant_dtype]


def bounded_scale(scale: F64, amax: F64, quant_dtype: str, scale_ub: float | None, scale_min: float | None) -> F64:
    """A scale between the floor and `scale_ub`, which an infinite amax passes."""
    if scale_ub is not None:
        scale = np.where(np.isfinite(amax), np.minimum(scale, float(np.float32(scale_ub))), scale)
    return np.maximum(scale, float(np.float32(scale_floor(quant_dtype, scale_min))))


def least_divisor(quant_dtype: str, scale_min: float | None) -> float:
    """The least number that y is divided by."""
    return float(np.float32(scale_floor(quant_dtype, scale_min) or LEAST_DIVISOR))


def power_of_two_above(scale: F64) -> F64:
    """The least power of two that is at least `scale`; infinity and NaN stay."""
    mantissa, exponent = np.frexp(scale)
    return np.where(np.isfinite(scale), np.ldexp(1.0, exponent - (mantissa == 0.5)), scale)


def exponent_bytes(scale: F64) -> F64:
    """Biased exponents of powers of two, 255 for NaN and infinity, padded with 0 to a multiple of four."""
    _, exponent = np.frexp(np.where(np.isfinite(scale), scale, 1.0))
    biased = np.where(np.isfinite(scale), exponent - 1 + 127, 255).astype(np.float64)
    return np.pad(biased, [(0, 0)] * (biased.ndim - 1) + [(0, -biased.shape[-1] % 4)])


def valid_rows(x: Array, num_rows: Array | None) -> Any:
    """Whether each row counts: [E, T, 1], or True."""
    return True if num_rows is None else (np.arange(x.shape[1]) < to_f64(num_rows)[:, None])[..., None]


def store(value: F64, output: Output) -> Array:
    """A result rounded to its dtype; of a packed scale the bytes, four to an int32."""
    if output.dtype != "int32":
        return round_to(value, output.dtype)
    return np.ascontiguousarray(round_to(value, "uint8")).view(np.int32)


class Interval(NamedTuple):
    """An exact value, and the ends of what a right backend may have in its place."""

    value: F64
    low: F64
    high: F64


def bounds(exact: Mapping[str, F64], given: Any, error: Error) -> dict[str, Exact]:
    """The error of y, through the largest |y| to scale, and of both to q."""
    y = _activation_interval(given, *error("y"))
    scale = _scale_interval(y, given, *error("scale"))
    q = _quantised_interval(y, scale, given, error("q")[0])
    packed = given.scale_format == "ue8m0_packed"
    stored = Interval(*map(exponent_bytes, scale)) if packed else scale
    valid = valid_rows(given.x, given.num_rows)
    results = {}
    for name, (value, low, high) in (("q", q), ("scale", stored)):
        ends = np.where(valid, value, 0.0), np.where(valid, low, -np.inf), np.where(valid, high, np.inf)
        results[name] = Exact(*ends, as_bytes=packed and name == "scale")
    return results


def _activation_interval(given: Any, relative: float, flush: float) -> Interval:
    gate, up = gate_and_up(given.x, given.up, given.limit)
    sigma = sigmoid(gate)
    silu = gate * sigma
    steps = relative * (1 + np.maximum(-gate, 0))
    flushed = np.abs(gate) * np.minimum(sigma, flush) + np.minimum(np.abs(silu), flush)
    if given.materialize:
        error = steps * np.abs(silu) + flushed
        error = np.where(np.isfinite(silu), error, 0.0)
        ends = [rounded(rounded(end, given.x) * up, given.x) for end in (silu, silu - error, silu + error)]
        lost = (flush > 0) & (may_flush(up) | may_flush(ends[0]))  # products with 0, or 0
        y = Interval(ends[0], *(pick(ends[1], ends[2]) for pick in (np.minimum, np.maximum)))
        y = Interval(
            y.value, np.where(lost, np.minimum(y.low, 0), y.low), np.where(lost, np.maximum(y.high, 0), y.high)
        )
    else:
        value = overflowed(silu * up)
        error = steps * np.abs(value) + flushed * np.abs(up) + flush * (1 + np.abs(silu))
        error = np.where(np.isfinite(value), error, 0.0)
        y = Interval(value, value - error, value + error)
    # An infinite factor meets one that may count as 0: NaN and infinity are both right.
    either = np.isinf(up) & (gate != 0) & (np.minimum(sigma, np.abs(silu)) < FP32_TINY) | np.isinf(silu) & may_flush(up)
    return Interval(
        np.where(either, np.nan, y.value), np.where(either, np.inf, y.low), np.where(either, np.inf, y.high)
    )


def _scale_interval(y: Interval, given: Any, relative: float, flush: float) -> Interval:
    """Scales [..., D / group_size] before they are stored."""
    value, low, high = (grouped(part, given.group_size) for part in y)
    nearest = np.where((low <= 0) & (high >= 0), 0.0, np.minimum(np.abs(low), np.abs(high)))
    amax = np.abs(value).max(-1, initial=0.0)
    least, most = nearest.max(-1, initial=0.0), np.maximum(np.abs(low), np.abs(high)).max(-1, initial=0.0)
    power_of_two = given.scale_format != "float32"
    # Rounded up to a power of two, an exact quotient must not be pushed over one.
    slack = (0.0, -relative, 0.0 if power_of_two else relative)
    scales = []
    for end, widen, least_normal in zip((amax, least, most), slack, (0.0, flush, 0.0), strict=True):
        scale = raw_scale(end, given.quant_dtype, given.reciprocal) * (1 + widen)
        scale = np.where(scale < least_normal, 0.0, scale)
        scale = bounded_scale(scale, amax, given.quant_dtype, given.scale_ub, given.scale_min)
        scales.append(power_of_two_above(scale) if power_of_two else scale)
    return Interval(*scales)


def _quantised_interval(y: Interval, scale: Interval, given: Any, relative: float) -> Interval:
    """q [..., D] before rounding."""
    qmax, least = QMAX[given.quant_dtype], least_divisor(given.quant_dtype, given.scale_min)
    s, s_low, s_high = (np.repeat(np.maximum(part, least), given.group_size, axis=-1) for part in scale)
    low = y.low / np.where(y.low >= 0, s_high, s_low)
    high = y.high / np.where(y.high >= 0, s_low, s_high)
    unrounded = (y.low == y.high) & (s_low == s_high) & (np.frexp(s)[0] == 0.5)
    slack = np.where(unrounded, 0.0, relative)
    ends = (y.value / s, low - slack * np.abs(low), high + slack * np.abs(high))
    missing = 0.0 if given.quant_dtype == "int8" else np.nan
    clipped = (np.clip(end, -qmax, qmax) for end in ends)
    return Interval(*(np.where(np.isnan(end), missing, end) for end in clipped))


silu_mul_block_quant = Oracle(SPEC, formula, bounds, store)
