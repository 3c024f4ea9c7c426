"""`gdn_conv_prep` as one Mosaic GPU kernel; the formula is that of `polyfuse.spec.gdn_conv_prep`.

The kernel of `gdn_post_conv`, which computes y here where it loads it there. A program loads each row of x once, for
all of the rows that look back to it. The weights and the states before each sequence come to it with channels last:
`jax.numpy` turns them round, which is little beside x.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from polyfuse.reference.pallas.mosaic.gdn_post_conv import ROWS, kernel_of_heads, whole_program
from polyfuse.reference.pallas.mosaic.tiles import Tile


def kernel_of(
    sources: dict[str, jax.Array],
    *gates: jax.Array,
    interleaved: bool,
    activation: str | None,
    size: int,
    **attrs: Any,
) -> Callable[..., Any] | None:
    """Return the kernel of a call, or None if it has none: for interleaved columns, and see `kernel_of_heads`."""
    if interleaved:
        return None
    names = sorted(sources)

    def arrays(sources: dict[str, jax.Array]) -> list[jax.Array]:
        return [_in_heads(name, sources[name], size) for name in names]

    def load(refs: list[Any], row: jax.Array, heads: Any, tile: Tile) -> list[jax.Array]:
        return _rows(dict(zip(names, refs, strict=True)), row, heads, tile, activation)

    return kernel_of_heads(arrays, load, *gates, name="gdn_conv_prep", size=size, **attrs)


def _in_heads(name: str, array: jax.Array, size: int) -> jax.Array:
    """An array of channels as [..., heads, size]; of x, `age` and `number` as many rows as a program takes."""
    if name in ("x", "age", "number"):
        array = whole_program(array)
    if name in ("age", "number"):
        return array
    if name in ("weight", "state"):  # [C, W] and [S, C, n]
        array = array.swapaxes(-1, -2)
    return array.reshape(*array.shape[:-1], -1, size)


def _rows(refs: dict[str, Any], row: jax.Array, heads: Any, tile: Tile, activation: str | None) -> list[jax.Array]:
    """y in float32 of ROWS rows, a tile of heads of each."""

    def load(ref: Any) -> jax.Array:
        return tile.load(ref).astype(jnp.float32)

    before = refs["weight"].shape[0] - 1
    inputs = [load(refs["x"].at[jnp.maximum(row + i - before, 0), heads, :]) for i in range(ROWS + before)]
    weights = [load(refs["weight"].at[tap, heads, :]) for tap in range(before + 1)]
    bias = load(refs["bias"].at[heads, :]) if "bias" in refs else None
    results = []
    for i in range(ROWS):
        age, number = refs["age"][row + i], refs["number"][row + i]
        c = inputs[i + before] * weights[before]
        for lag in range(1, before + 1):
            earlier = _earlier(refs.get("state"), age - lag, number, heads, tile)
            c += jnp.where(age >= lag, inputs[i + before - lag], earlier) * weights[before - lag]
        if bias is not None:
            c += bias
        results.append(_silu(c) if activation else c)
    return results


def _earlier(state_ref: Any, back: jax.Array, number: jax.Array, heads: Any, tile: Tile) -> jax.Array:
    """The input so many rows before the first row of a sequence, from its state, or zeros. `back` is below 0 there."""
    zeros = tile.zeros()
    if state_ref is None:
        return zeros
    count, columns, *_ = state_ref.shape
    there = (back < 0) & (number >= 0) & (number < count)
    kept = state_ref.at[number, columns + back, heads, :]
    return lax.cond(there, lambda: tile.load(kept).astype(jnp.float32), lambda: zeros)


def _silu(c: jax.Array) -> jax.Array:
    """c * sigmoid(c), of which the sigmoid is the square of a reciprocal root, as in `silu_mul_block_quant`."""
    root = lax.rsqrt(1 + jnp.exp(-c))
    return c * root * root
