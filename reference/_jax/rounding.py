"""Rounding and clamping in float32 that XLA and Triton compute alike.

XLA may drop a cast to a narrower dtype and back, and folds (x + c) - c; Triton has no rounding to an integer, and its
min and max drop NaN. Nothing here relies on these.
"""

import jax
import jax.numpy as jnp
from jax import lax

MANTISSA_BITS = 23


def clamp(x: jax.Array, low: float, high: float) -> jax.Array:
    """Return `x` between `low` and `high`; NaN stays NaN."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def rint(x: jax.Array) -> jax.Array:
    """Return the nearest integer, ties to even, for |x| < 2**22; infinity and NaN stay."""
    below = jnp.floor(x)
    rest = x - below
    odd = (below.astype(jnp.int32) & 1) == 1
    return below + jnp.where((rest > 0.5) | ((rest == 0.5) & odd), 1.0, 0.0)


def round_to(x: jax.Array, dtype: str) -> jax.Array:
    """Return the nearest values of a float dtype of 32 bits or fewer, ties to even, as float32.

    Beyond the largest of them comes infinity, also in dtypes without one.
    """
    if dtype == "float32":
        return x
    info = jnp.finfo(dtype)
    exponent = (bits_of(x) >> MANTISSA_BITS) & 0xFF
    # Biased exponent of the grid's step; at least 1, so that it and its reciprocal are normal.
    step = jnp.maximum(jnp.maximum(exponent, info.minexp + 127) - info.nmant, 1)
    rounded = rint(x * from_exponent(254 - step)) * from_exponent(step)
    return jnp.where(jnp.abs(rounded) > float(info.max), rounded * jnp.inf, rounded)


def bits_of(x: jax.Array) -> jax.Array:
    """Return the bits of float32 numbers as int32."""
    return lax.bitcast_convert_type(x, jnp.int32)


def from_exponent(biased_exponent: jax.Array) -> jax.Array:
    """Return the float32 number 2**(biased_exponent - 127), for a biased exponent from 1 to 254."""
    return lax.bitcast_convert_type(biased_exponent << MANTISSA_BITS, jnp.float32)
