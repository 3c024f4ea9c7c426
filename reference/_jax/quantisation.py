"""The arithmetic of `silu_mul_block_quant` in jax.numpy, for both JAX layers: float32, and integers for exponents."""

from math import frexp

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from polyfuse.reference._jax.rounding import MANTISSA_BITS, bits_of, clamp, from_exponent, rint, round_to
from polyfuse.spec.silu_mul_block_quant import LEAST_DIVISOR, QMAX, scale_floor

_INFINITY = 0x7F800000
_LARGEST_SCALE = 2.0**127  # no finite amax / qmax reaches it


def silu_mul(gate: jax.Array, up: jax.Array, dtype: str, limit: float | None, materialize: bool) -> jax.Array:
    """Return silu(gate) * up of float32 arrays; `materialize` rounds silu and the product to `dtype`."""
    if limit is not None:
        gate, up = jnp.where(gate > limit, limit, gate), clamp(up, -limit, limit)
    silu = gate / (1 + jnp.exp(-gate))
    if materialize:
        return round_to(round_to(silu, dtype) * up, dtype)
    return silu * up


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
    least, most = scale_floor(quant_dtype, scale_min), _LARGEST_SCALE
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


def divisor(scale: jax.Array, scale_min: float | None) -> jax.Array:
    """Return what the values of a group are divided by: its scale, or the least divisor if that is larger."""
    return jnp.where(scale < LEAST_DIVISOR, LEAST_DIVISOR, scale) if scale_min == 0 else scale


def quantised(ratio: jax.Array, dtype: str) -> jax.Array:
    """Return `ratio` rounded to nearest even in `dtype`, saturating; NaN stays NaN, and is 0 in int8."""
    clamped = clamp(ratio, -QMAX[dtype], QMAX[dtype])
    if dtype == "int8":
        return jnp.where(jnp.isnan(ratio), 0.0, rint(clamped)).astype(dtype)
    return clamped.astype(dtype)


def exponent_byte(scale: jax.Array) -> jax.Array:
    """Return the biased exponents of powers of two as uint8; those of infinity and NaN are 255."""
    return (bits_of(scale) >> MANTISSA_BITS).astype(jnp.uint8)


def _log2_above(value: float) -> int:
    """Return the least e with 2**e >= float32(value)."""
    mantissa, exponent = frexp(np.float32(value))
    return exponent - (mantissa == 0.5)
