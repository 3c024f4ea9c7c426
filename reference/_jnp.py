"""What the two JAX layers share: rounding, block scales and quantisation of float32 arrays.

XLA may drop a cast to a narrower dtype and back, and Triton's min and max drop NaN: neither is relied on here.
"""

from math import frexp

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from polyfuse.spec.silu_mul_block_quant import QMAX, scale_floor

_INFINITY_BITS = 0x7F800000
_MANTISSA_BITS = 23
_LARGEST_SCALE = 2.0**127  # no finite amax / qmax reaches it


def clamp(x: jax.Array, low: float, high: float) -> jax.Array:
    """`x` between `low` and `high`; NaN stays NaN."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def rint(x: jax.Array) -> jax.Array:
    """To the nearest integer below 2**22, ties to even; infinity and NaN stay."""
    below = jnp.floor(x)
    rest = x - below
    odd = (below.astype(jnp.int32) & 1) == 1
    return below + jnp.where((rest > 0.5) | ((rest == 0.5) & odd), 1.0, 0.0)


def round_to(x: jax.Array, dtype: str) -> jax.Array:
    """Float32 `x` with the nearest value of float32, bfloat16 or float16, ties to even."""
    if dtype == "float32":
        return x
    info = jnp.finfo(dtype)
    exponent = (_bits(x) >> _MANTISSA_BITS) & 0xFF
    # The grid's step has a normal float32 below it and above it, so that both powers of two are exact.
    step = jnp.maximum(jnp.maximum(exponent, info.minexp + 127) - info.nmant, 1)
    rounded = rint(x * _power_of_two(254 - step)) * _power_of_two(step)
    return jnp.where(jnp.abs(rounded) > float(info.max), rounded * jnp.inf, rounded)


def silu_mul(gate: jax.Array, up: jax.Array, dtype: str, limit: float | None, materialize: bool) -> jax.Array:
    """Silu of the clamped gate, times the clamped up; all float32. `dtype` is what materialize rounds to."""
    if limit is not None:
        gate, up = jnp.where(gate > limit, limit, gate), clamp(up, -limit, limit)
    silu = gate / (1 + jnp.exp(-gate))
    if materialize:
        return round_to(round_to(silu, dtype) * up, dtype)
    return silu * up


def block_scale(y: jax.Array, quant_dtype: str, power_of_two: bool, scale_ub: float | None) -> jax.Array:
    """The scale of each group of `y` [..., groups, group_size], float32."""
    qmax = np.float32(QMAX[quant_dtype])
    least, most = scale_floor(quant_dtype), _LARGEST_SCALE
    if scale_ub is not None:
        most = min(max(scale_ub, least), most)
    # As integers magnitudes keep their order, and NaN comes after infinity.
    bits = jnp.max(_bits(y) & 0x7FFFFFFF, axis=-1)
    amax = lax.bitcast_convert_type(bits, jnp.float32)
    if power_of_two:
        # amax <= qmax * 2**e exactly where bits(amax) <= bits(qmax) + e * 2**23.
        step = 1 << _MANTISSA_BITS
        exponent = (bits - int(qmax.view(np.int32)) + step - 1) >> _MANTISSA_BITS
        scale = _power_of_two(jnp.clip(exponent, _log2_above(least), _log2_above(most)) + 127)
    else:
        # Within one rounding more of a division; Triton's own is less exact than that.
        scale = jnp.clip(amax * (1 / qmax), least, most)
    return jnp.where(bits < _INFINITY_BITS, scale, amax)


def exponent_byte(scale: jax.Array) -> jax.Array:
    """The biased exponent of a power of two, uint8; 255 for infinity and NaN."""
    return (_bits(scale) >> _MANTISSA_BITS).astype(jnp.uint8)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _power_of_two(biased_exponent: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(biased_exponent << _MANTISSA_BITS, jnp.float32)


def _log2_above(value: float) -> int:
    """The least e with float32(value) <= 2**e."""
    mantissa, exponent = frexp(np.float32(value))
    return exponent - (mantissa == 0.5)
