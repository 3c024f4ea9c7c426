"""The arithmetic of quantising ops in jax.numpy, for both JAX layers: float32, and integers for exponents."""

from math import frexp

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from polyfuse.reference._jax.rounding import MANTISSA_BITS, bits_of, clamp, from_exponent, rint, round_to
from polyfuse.spec.block_quant import FLOAT4, LARGEST_E4M3, LEAST_DIVISOR, QMAX, scale_floor

_INFINITY = 0x7F800000
_LARGEST_SCALE = 2.0**127  # no finite amax / qmax reaches it


def silu_mul(
    gate: jax.Array,
    up: jax.Array,
    dtype: str,
    *,
    alpha: float,
    up_offset: float,
    limit: float | None,
    limit_on: str,
    materialize: bool,
) -> jax.Array:
    """Return gate * sigmoid(alpha * gate) * (up + up_offset) of float32 arrays; `materialize` rounds to `dtype`."""

    def stored(value: jax.Array) -> jax.Array:
        return round_to(value, dtype) if materialize else value

    if limit is not None:
        gate, up = jnp.where(gate > limit, limit, gate) if limit_on == "input" else gate, clamp(up, -limit, limit)
    if materialize and alpha != 1:
        silu = stored(gate * stored(1 / (1 + jnp.exp(-stored(alpha * gate)))))
    else:
        silu = stored(gate / (1 + jnp.exp(-gate if alpha == 1 else -(alpha * gate))))
    if limit is not None and limit_on == "silu":
        silu = jnp.where(silu > limit, limit, silu)
    return stored(silu * (stored(up + up_offset) if up_offset else up))


def weighted(y: jax.Array, weight: jax.Array | None, dtype: str, materialize: bool) -> jax.Array:
    """Return y times a weight that broadcasts against it, rounded as `silu_mul` does."""
    if weight is None:
        return y
    y = y * weight.astype(jnp.float32)
    return round_to(y, dtype) if materialize else y


def block_scale(
    y: jax.Array,
    quant_dtype: str,
    power_of_two: bool,
    scale_ub: float | None,
    scale_min: float | None,
    reciprocal: bool,
) -> jax.Array:
    """Return the scale of each group of `y` [..., groups, group_size]: [..., groups]."""
    qmax = np.float32(QMAX[quant_dtype])
    least, most = scale_floor(quant_dtype, scale_min, "ue8m0" if power_of_two else "float32"), _LARGEST_SCALE
    if scale_ub is not None:
        most = min(max(scale_ub, least), most)
    # Magnitudes are ordered as their bits are, and NaN comes last.
    bits = jnp.max(bits_of(y) & 0x7FFFFFFF, axis=-1)
    amax = lax.bitcast_convert_type(bits, jnp.float32)
    product = amax * (1 / qmax)
    if power_of_two:
        # amax <= qmax * 2**e where bits(amax) <= bits(qmax) + e * 2**23: no quotient that could be rounded.
        above = bits_of(product) - (127 << MANTISSA_BITS) if reciprocal else bits - int(qmax.view(np.int32))
        exponent = (above + (1 << MANTISSA_BITS) - 1) >> MANTISSA_BITS
        scale = from_exponent(jnp.clip(exponent, _log2_above(least), _log2_above(most)) + 127)
    else:
        # In place of the quotient too: the product is closer than Triton's division.
        scale = jnp.clip(product, least, most)
    return jnp.where(bits < _INFINITY, scale, amax)


def e4m3_scale(y: jax.Array, quant_dtype: str, factor: jax.Array | float) -> jax.Array:
    """Return the scale of each group of `y`, a float32 number that float8_e4m3fn has; NaN of one that is not finite."""
    amax = jnp.max(jnp.abs(y), axis=-1)
    scale = amax / (QMAX[quant_dtype] * factor)
    finite = jnp.max(bits_of(y) & 0x7FFFFFFF, axis=-1) < _INFINITY
    limited = jnp.where(scale > LARGEST_E4M3, LARGEST_E4M3, scale)
    return jnp.where(finite, round_to(limited, "float8_e4m3fn"), jnp.nan)


def divisor(scale: jax.Array, scale_min: float | None) -> jax.Array:
    """Return what the values of a group are divided by: its scale, or the least divisor if that is larger."""
    return jnp.where(scale < LEAST_DIVISOR, LEAST_DIVISOR, scale) if scale_min == 0 else scale


def quantised(ratio: jax.Array, dtype: str) -> jax.Array:
    """Return `ratio` rounded to nearest even in `dtype`, saturating; NaN stays NaN, and is 0 in int8 and float4_e2m1.

    float4_e2m1 gives pairs of codes in a byte, the first in the low half.
    """
    clamped = clamp(ratio, -QMAX[dtype], QMAX[dtype])
    if dtype == FLOAT4:
        codes = _e2m1_codes(clamped)
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    if dtype == "int8":
        return jnp.where(jnp.isnan(ratio), 0.0, rint(clamped)).astype(dtype)
    return clamped.astype(dtype)


def exponent_byte(scale: jax.Array) -> jax.Array:
    """Return the biased exponents of powers of two as uint8; those of infinity and NaN are 255."""
    return (bits_of(scale) >> MANTISSA_BITS).astype(jnp.uint8)


def _e2m1_codes(q: jax.Array) -> jax.Array:
    """Return the four bits of numbers from -6 to 6; 0 for NaN."""
    size = jnp.abs(q)
    code = jnp.where(size < 2, rint(2 * size), jnp.where(size < 4, rint(size) + 2, rint(size / 2) + 4))
    negative = (bits_of(q) >> 28) & 8
    return jnp.where(jnp.isnan(q), 0, code.astype(jnp.int32) | negative).astype(jnp.uint8)


def _log2_above(value: float) -> int:
    """Return the least e with 2**e >= float32(value)."""
    mantissa, exponent = frexp(np.float32(value))
    return exponent - (mantissa == 0.5)
