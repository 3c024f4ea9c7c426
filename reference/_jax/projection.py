"""The channels of `gdn_conv_prep` in a row of its projection, in jax.numpy, for both JAX layers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def channels_of(heads: int, size: int, interleaved: bool) -> Callable[[jax.Array], jax.Array]:
    """Return the function that takes rows of x, its last axis, to their channels [q | k | v]."""

    def channels(x: jax.Array) -> jax.Array:
        if not interleaved:
            return x
        lead, width = x.shape[:-1], x.shape[-1] // heads
        values = (width - 2 * size) // 2
        q, k, v, _ = jnp.split(x.reshape(*lead, heads, width), (size, 2 * size, 2 * size + values), axis=-1)
        return jnp.concatenate([part.reshape(*lead, heads * part.shape[-1]) for part in (q, k, v)], axis=-1)

    return channels
