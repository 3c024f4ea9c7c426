"""The index arithmetic of `pos_embed_interpolate` in jax.numpy, for both JAX layers: exact integers and float32."""

import jax
import jax.numpy as jnp
from jax import lax


def patch(row: jax.Array, w: jax.Array, merge_size: int) -> tuple[jax.Array, jax.Array]:
    """Return the patch coordinates of a frame's `row`-th row, in spatial-merge order (h/m, w/m, m, m)."""
    block, inner = divide(row, merge_size * merge_size)
    block_y, block_x = divide(block, divide(w, merge_size)[0])
    inner_y, inner_x = divide(inner, merge_size)
    return block_y * merge_size + inner_y, block_x * merge_size + inner_x


def axis_taps(
    index: jax.Array, size: jax.Array, side: int, mode: str, align_corners: bool
) -> list[tuple[jax.Array, jax.Array]]:
    """Return each tap's (table cell, weight), for positions `index` on axes of `size` patches over `side` cells."""
    if align_corners:
        numerator, denominator = index * (side - 1), jnp.maximum(size - 1, 1)
    else:
        numerator, denominator = (2 * index + 1) * side - size, 2 * size
    # Division truncates; a negative numerator is above -denominator, so its floor is -1.
    cell = jnp.where(numerator < 0, -1, lax.div(numerator, denominator))
    f = (numerator - cell * denominator).astype(jnp.float32) / denominator.astype(jnp.float32)
    g = 1 - f
    if mode == "bilinear":
        taps = [(0, g), (1, f)]
    else:
        a = -0.75
        taps = [
            (-1, a * f * g * g),
            (0, g * (1 + f - (a + 2) * f * f)),
            (1, f * (1 + g - (a + 2) * g * g)),
            (2, a * g * f * f),
        ]
    return [(jnp.clip(cell + offset, 0, side - 1), weight) for offset, weight in taps]


def divide(a: jax.Array, b: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Return the quotient and the remainder for a >= 0 and b > 0, where truncation is the floor."""
    quotient = lax.div(a, lax.full_like(a, b) if isinstance(b, int) else b)
    return quotient, a - quotient * b
