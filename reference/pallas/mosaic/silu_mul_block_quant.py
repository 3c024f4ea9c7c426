"""`silu_mul_block_quant` as one Mosaic GPU kernel; the formula is that of `polyfuse.spec.silu_mul_block_quant`.

A program takes some groups of one or more rows: of each row a tile [groups, group_size] of gates and one of ups.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from polyfuse.reference._jax.quantisation import block_scale, divisor, exponent_byte
from polyfuse.reference.pallas.mosaic.tiles import Tile, launch, tile_of
from polyfuse.spec.block_quant import QMAX

QUANT_DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8")

_TILE = 2048  # elements of q that a program has


def kernel_of(
    gates: jax.Array,
    ups: jax.Array,
    *others: jax.Array,
    masked: bool,
    width: int,
    quant_dtype: str,
    materialize: bool,
    **attrs: Any,
) -> Callable[..., Any] | None:
    """Return the kernel of a call with the sources [1, rows, parts, groups, group_size], or None if it has none.

    It has one for groups of 32, 64, 128 or 256 columns, of which every row has a multiple of 512 (of 1024 in groups of
    256) and no shorter last one, and a quant_dtype in QUANT_DTYPES; without num_rows and row_weight, which are the
    `others`, and without materialize. How many rows a call has does not matter, as another kernel gives other bits.
    """
    *_, groups, size = gates.shape
    tile = tile_of(groups, size, _TILE)
    if tile is None or masked or others or materialize or quant_dtype not in QUANT_DTYPES or width != groups * size:
        return None
    return partial(_launch, tile=tile, quant_dtype=quant_dtype, **attrs)


def _launch(
    gates: jax.Array,
    ups: jax.Array,
    *,
    tile: Tile,
    quant_dtype: str,
    scale_format: str,
    **attrs: Any,
) -> Any:
    """q [1, rows, groups, group_size] and scale [1, rows, groups].

    The gate is the first part of gates, up the last part of ups.
    """
    _, length, parts, groups, size = gates.shape
    tiles = groups // tile.rows  # of a row
    span = min(length, max(1, _TILE // (tile.rows * size)))  # rows of a program

    def body(program: jax.Array, gate_ref: Any, up_ref: Any, q_ref: Any, scale_ref: Any) -> None:
        # The last programs may have rows in common, and write the same there.
        first = jnp.minimum(lax.div(program, jnp.int32(tiles)) * span, length - span)
        columns = pl.ds(lax.rem(program, jnp.int32(tiles)) * tile.rows, tile.rows)
        rows = [first + row for row in range(span)]
        sources = [
            (tile.load(gate_ref.at[0, row, 0, columns, :]), tile.load(up_ref.at[0, row, parts - 1, columns, :]))
            for row in rows
        ]
        for row, (gate, up) in zip(rows, sources, strict=True):
            q, scale = _quantised(gate, up, tile, quant_dtype, scale_format != "float32", **attrs)
            q_ref[0, row, columns, :] = q
            scale_ref[0, row, columns] = exponent_byte(scale) if scale_ref.dtype == jnp.uint8 else scale

    return launch(
        body,
        (
            jax.ShapeDtypeStruct((1, length, groups, size), quant_dtype),
            jax.ShapeDtypeStruct((1, length, groups), "uint8" if scale_format == "ue8m0_packed" else "float32"),
        ),
        pl.cdiv(length, span) * tiles,
        gates,
        ups,
        name="silu_mul_block_quant",
    )


def _quantised(
    gate: jax.Array,
    up: jax.Array,
    tile: Tile,
    quant_dtype: str,
    power_of_two: bool,
    *,
    scale_ub: float | None,
    scale_min: float | None,
    reciprocal: bool,
    **activation: Any,
) -> tuple[jax.Array, jax.Array]:
    """q [groups, group_size] and scale [groups] of a tile."""
    y = _silu_mul(gate.astype(jnp.float32), up.astype(jnp.float32), **activation)
    scale = block_scale(y, quant_dtype, power_of_two, scale_ub, scale_min, reciprocal)
    # One division for each group: the product with the reciprocal is within the 3 roundings that the spec allows.
    ratio = y * tile.across(1 / divisor(scale, scale_min))
    q = jnp.clip(ratio, -QMAX[quant_dtype], QMAX[quant_dtype])  # NaN stays
    if quant_dtype == "int8":
        q = lax.round(jnp.where(ratio == ratio, q, 0.0), lax.RoundingMethod.TO_NEAREST_EVEN)
    return q.astype(quant_dtype), scale


def _silu_mul(
    gate: jax.Array, up: jax.Array, *, alpha: float, up_offset: float, limit: float | None, limit_on: str
) -> jax.Array:
    """gate * sigmoid(alpha * gate) * (up + up_offset) in float32.

    The sigmoid is the square of 1 / sqrt(1 + exp(-alpha * gate)): a GPU has an instruction for that root, and none for
    a division.
    """
    if limit is not None:
        gate, up = jnp.minimum(gate, limit) if limit_on == "input" else gate, jnp.clip(up, -limit, limit)
    root = lax.rsqrt(1 + jnp.exp(-gate if alpha == 1 else -(alpha * gate)))
    silu = gate * root * root
    if limit is not None and limit_on == "silu":
        silu = jnp.minimum(silu, limit)
    return silu * (up + up_offset if up_offset else up)
