"""What the two JAX layers share: float32 arithmetic that XLA and Triton compute alike.

XLA may drop a cast to a narrower dtype and back, and folds (x + c) - c; Triton has no rounding to an integer, and
its min and max drop NaN. Nothing here relies on these.
"""

from math import frexp

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from polyfuse.spec.silu_mul_block_quant import LEAST_DIVISOR, QMAX, scale_floor

_MANTISSA = 23  # bits
_INFINITY = 0x7F800000
_LARGEST_SCALE = 2.0**127  # no finite amax / qmax reaches it


def clamp(x: jax.Array, low: float, high: float) -> jax.Array:
    """`x` between `low` and `high`; NaN stays NaN."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def rint(x: jax.Array) -> jax.Array:
    """The nearest integer, ties to even, for |x| < 2**22; infinity and NaN stay."""
    below = jnp.floor(x)
    rest = x - below
    odd = (below.astype(jnp.int32) & 1) == 1
    return below + jnp.where((rest > 0.5) | ((rest == 0.5) & odd), 1.0, 0.0)


def round_to(x: jax.Array, dtype: str) -> jax.Array:
    """The nearest values of float32, bfloat16 or float16, ties to even, as float32."""
    if dtype == "float32":
        return x
    info = jnp.finfo(dtype)
    exponent = (_bits(x) >> _MANTISSA) & 0xFF
    # Biased exponent of the grid's step; at least 1, so that it and its reciprocal are normal.
    step = jnp.maximum(jnp.maximum(exponent, info.minexp + 127) - info.nmant, 1)
    rounded = rint(x * _power_of_two(254 - step)) * _power_of_two(step)
    return jnp.where(jnp.abs(rounded) > float(info.max), rounded * jnp.inf, rounded)


def silu_mul(gate: jax.Array, up: jax.Array, dtype: str, limit: float | None, materialize: bool) -> jax.Array:
    """silu(gate) * up of float32 arrays; `materialize` rounds silu and the product to `dtype`."""
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
    """The scale of each group of `y` [..., groups, group_size]."""
    qmax = np.float32(QMAX[quant_dtype])
    least, most = scale_floor(quant_dtype, scale_min), _LARGEST_SCALE
    if scale_ub is not None:
        most = min(max(scale_ub, least), most)
    # Magnitudes are ordered as their bits are, and NaN comes last.
    bits = jnp.max(_bits(y) & 0x7FFFFFFF, axis=-1)
    amax = lax.bitcast_convert_type(bits, jnp.float32)
    product = amax * (1 / qmax)
    if power_of_two:
        # amax <= qmax * 2**e where bits(amax) <= bits(qmax) + e * 2**23: no quotient that could be rounded.
        above = _bits(product) - (127 << _MANTISSA) if reciprocal else bits - int(qmax.view(np.int32))
        exponent = (above + (1 << _MANTISSA) - 1) >> _MANTISSA
        scale = _power_of_two(jnp.clip(exponent, _log2_above(least), _log2_above(most)) + 127)
    else:
        # In place of the quotient too: the product is closer than Triton's division.
        scale = jnp.clip(product, least, most)
    return jnp.where(bits < _INFINITY, scale, amax)


def divisor(scale: jax.Array, scale_min: float | None) -> jax.Array:
    """What the values of a group are divided by."""
    return jnp.where(scale < LEAST_DIVISOR, LEAST_DIVISOR, scale) if scale_min == 0 else scale


def quantised(ratio: jax.Array, dtype: str) -> jax.Array:
    """Rounded to nearest even, saturating; NaN stays, and is 0 in int8."""
    clamped = clamp(ratio, -QMAX[dtype], QMAX[dtype])
    if dtype == "int8":
        return jnp.where(jnp.isnan(ratio), 0.0, rint(clamped)).astype(dtype)
    return clamped.astype(dtype)


def exponent_byte(scale: jax.Array) -> jax.Array:
    """The biased exponent of a power of two, 255 for infinity and NaN, as uint8."""
    return (_bits(scale) >> _MANTISSA).astype(jnp.uint8)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _power_of_two(biased_exponent: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(biased_exponent << _MANTISSA, jnp.float32)


def _log2_above(value: float) -> int:
    """The least e with 2**e >= float32(value)."""
    mantissa, exponent = frexp(np.float32(value))
    return exponent - (mantissa == 0.5)


def sequences(length: int, cu_seqlens: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Per row the sequence that it is in, -1 before the first one; and how many of its rows come before it."""
    row = jnp.arange(length, dtype=jnp.int32)
    if cu_seqlens is None:
        return jnp.zeros_like(row), row
    starts = cu_seqlens.astype(jnp.int32)
    number = jnp.searchsorted(starts, row, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    return number, row - jnp.where(number < 0, 0, starts[number])


def final_state(
    x: jax.Array, state: jax.Array | None, cu_seqlens: jax.Array | None, before: int, wanted: bool
) -> jax.Array:
    """The last `before` inputs of each sequence, oldest first [S, C, before]; of none if not `wanted`."""
    starts = jnp.array([0, len(x)]) if cu_seqlens is None else cu_seqlens
    count = len(starts) - 1 if wanted else 0
    if state is None:
        state = jnp.zeros((count, x.shape[1], before), x.dtype)
    if len(x) == 0 or count == 0:
        return state[:count]
    rows = starts[1:, None] - before + jnp.arange(before)  # [S, before]
    missing = starts[:-1, None] - rows  # how far before the sequence; at most 0 inside it
    kept = jnp.take_along_axis(state, jnp.maximum(before - missing, 0)[:, None], axis=2, mode="clip")
    last = x.at[rows].get(mode="clip").transpose(0, 2, 1)
    return jnp.where((missing > 0)[:, None], kept, last)
