"""`gdn_post_conv` as one Mosaic GPU kernel; the formula is that of `polyfuse.spec.gdn_post_conv`.

A program takes some rows, and of these a tile of heads, or all gates. The heads are those of a row [q | k | v], where
columns of v count as heads as wide as those of q and k.
"""

from collections.abc import Callable
from functools import partial
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from polyfuse.reference.pallas.mosaic.tiles import LANES, Tile, launch, tile_of
from polyfuse.spec import FP32_TINY

ROWS = 8  # of a program
_TILE = 1024  # elements that a program has of a row


def kernel_of(conv_out: jax.Array, *gates: jax.Array, size: int, **attrs: Any) -> Callable[..., Any] | None:
    """Return the kernel of a call, or None if it has none: see `kernel_of_heads`."""

    def arrays(conv_out: jax.Array) -> list[jax.Array]:
        return [whole_program(conv_out.reshape(len(conv_out), -1, size))]

    def load(refs: list[Any], row: jax.Array, columns: Any, tile: Tile) -> list[jax.Array]:
        return [tile.load(refs[0].at[row + i, columns, :]) for i in range(ROWS)]

    return kernel_of_heads(arrays, load, *gates, name="gdn_post_conv", size=size, **attrs)


def kernel_of_heads(
    arrays: Callable[[Any], list[jax.Array]],
    load: Callable[[list[Any], jax.Array, Any, Tile], list[jax.Array]],
    *gates: jax.Array,
    heads: int,
    size: int,
    values: int,
    **attrs: Any,
) -> Callable[..., Any] | None:
    """Return the kernel of rows [q | k | v], or None if it has none for them.

    It has one for 16, 32, 64, 128 or 256 value heads, heads of q and k that are 32, 64, 128 or 256 wide and fill a
    multiple of 512 columns (1024 if they are 256 wide), and columns of v that do so too. How many rows a call has does
    not matter, as another kernel gives other bits; none at all need no kernel.

    The kernel takes the op's source and its gates. `load(refs, row, heads, tile)` gives the tiles of ROWS rows, from
    `row` on, of some of their heads; the refs are those of `arrays(source)`, which have ROWS rows or more.
    """
    length, heads_v = gates[0].shape
    tile = tile_of(gcd(heads, values // size), size, _TILE)
    if tile is None or values % size or heads_v not in (16, 32, 64, 128, 256) or not length:
        return None
    gate_tile = Tile(ROWS, heads_v, max(1, heads_v // LANES))
    attrs |= {"tile": tile, "gate_tile": gate_tile, "heads": heads, "values": values}
    return lambda source, *gates: _launch(arrays(source), *gates, load=load, **attrs)


def _launch(
    sources: list[jax.Array],
    *gates: jax.Array,
    load: Callable[[list[Any], jax.Array, Any, Tile], list[jax.Array]],
    name: str,
    tile: Tile,
    gate_tile: Tile,
    dtype: Any,
    heads: int,
    values: int,
    l2norm: bool,
    eps: float,
    output_g_exp: bool,
) -> Any:
    """q, k [L, H, K], v [L, values], g, beta [L, HV]."""
    rows, heads_v = gates[0].shape
    length = max(rows, ROWS)
    a, b, *vectors = gates
    of_qk, of_v = heads // tile.rows, values // tile.width // tile.rows  # tiles of a row
    tiles = 2 * of_qk + of_v + 1  # the last of the gates

    def body(program: jax.Array, *refs: Any) -> None:
        source_refs, gate_refs = list(refs[: len(sources)]), refs[len(sources) : -5]
        *head_refs, g_ref, beta_ref = refs[-5:]
        # The last programs may have rows in common, and write the same there.
        row = jnp.minimum(lax.div(program, jnp.int32(tiles)) * ROWS, length - ROWS)
        number = lax.rem(program, jnp.int32(tiles))

        @pl.when(number < tiles - 1)
        def _() -> None:
            found = load(source_refs, row, pl.ds(number * tile.rows, tile.rows), tile)
            firsts = (0, of_qk, 2 * of_qk, tiles - 1)
            for ref, first, end, norm in zip(head_refs, firsts[:3], firsts[1:], (l2norm, l2norm, False), strict=True):
                store = partial(_store, ref, row, (number - first) * tile.rows, found, tile, eps if norm else None)
                pl.when((number >= first) & (number < end))(store)

        @pl.when(number == tiles - 1)
        def _() -> None:
            rows = pl.ds(row, ROWS)
            a, b = (gate_tile.load(ref.at[rows, :]).astype(jnp.float32) for ref in gate_refs[:2])
            A_log, dt_bias = (gate_tile.load_row(ref).astype(jnp.float32) for ref in gate_refs[2:])
            g = -_decay_rate(a + gate_tile.down(dt_bias), gate_tile.down(A_log))
            g_ref[rows, :] = jnp.exp(g) if output_g_exp else g
            beta_ref[rows, :] = 1 / (1 + jnp.exp(-b))

    qk = jax.ShapeDtypeStruct((length, heads, tile.width), dtype)
    v = jax.ShapeDtypeStruct((length, values // tile.width, tile.width), dtype)
    gate = jax.ShapeDtypeStruct((length, heads_v), jnp.float32)
    programs = pl.cdiv(length, ROWS) * tiles
    arrays = *sources, whole_program(a), whole_program(b), *vectors
    q, k, v, *of_gates = launch(body, (qk, qk, v, gate, gate), programs, *arrays, name=name)
    return tuple(x[:rows] for x in (q, k, v.reshape(length, values), *of_gates))


def whole_program(array: jax.Array) -> jax.Array:
    """Rows of an array, with zeros behind them if they are fewer than a program takes."""
    missing = max(0, ROWS - len(array))
    return jnp.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)]) if missing else array


def _store(ref: Any, row: jax.Array, head: jax.Array, found: list[jax.Array], tile: Tile, eps: float | None) -> None:
    """Store the tiles of some rows, normalised if there is an eps."""
    for i, x in enumerate(found):
        if eps is not None:
            x = x.astype(jnp.float32)
            x = x * tile.across(lax.rsqrt(jnp.sum(x * x, axis=1) + max(eps, FP32_TINY)))
        ref[row + i, pl.ds(head, tile.rows), :] = x.astype(ref.dtype)


def _decay_rate(x: jax.Array, log_rate: jax.Array) -> jax.Array:
    """exp(log_rate) * softplus(x)."""
    # Below -20 softplus(x) is exp(x), which may underflow where the product does not.
    softplus = jnp.maximum(x, 0.0) + _log1p(jnp.exp(-jnp.abs(x)))
    return jnp.where(x < -20.0, jnp.exp(x + log_rate), jnp.exp(log_rate) * softplus)


def _log1p(x: jax.Array) -> jax.Array:
    """log(1 + x) for x from 0 to 1, which Mosaic GPU does not have: 2 atanh(x / (2 + x)).

    The series of atanh(s) / s in s * s, at most 1/9, is cut where its terms fall below 2**-26.
    """
    s = x / (2 + x)
    square, series = s * s, jnp.zeros_like(s)
    for power in range(13, 1, -2):
        series = (series + 1 / power) * square
    return 2 * s * (1 + series)
