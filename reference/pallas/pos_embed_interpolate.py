"""`pos_embed_interpolate` as one Pallas kernel; the formula is the docstring of `polyfuse.spec.pos_embed_interpolate`.

Each program computes a tile of the result and finds the image of each of its rows in the grid itself, so one
launch serves all images. Loads and stores are masked because Triton, unlike the interpreter, does not pad tiles.

Works under `jax.jit` and `jax.vmap`. A `pallas_call` is opaque to the partitioner: to split D over devices,
use `jax.shard_map(..., check_vma=False)`.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from polyfuse.reference._jax.compilation import jit
from polyfuse.reference._jax.interpolation import axis_taps, divide, patch
from polyfuse.spec import Capability, Unsupported, dtype_name
from polyfuse.spec.pos_embed_interpolate import table_sides

# No TPU: Mosaic cannot gather table rows by a vector of row numbers.
CAPABILITY = Capability(devices=("cpu", "cuda", "rocm"), min_arch={"cuda": (8, 0)}, interpreted=("cpu",))

_INT32_MAX = 2**31 - 1
_GPU_TILE = (32, 128)
_CPU_TILE_ROWS = 4096  # the interpreter pays per program, so few and large ones


def pos_embed_interpolate(
    table: jax.Array,
    grid_thw: Sequence[Sequence[int]] | jax.Array,
    *,
    merge_size: int = 2,
    mode: str = "bilinear",
    align_corners: bool = True,
    base: jax.Array | None = None,
    out_dtype: str | None = None,
    out_rows: int | None = None,
    table_height: int | None = None,
) -> jax.Array:
    """[rows, D], rounded once."""
    rows = sum(t * h * w for t, h, w in grid_thw) if out_rows is None else out_rows
    width = table.shape[1]
    if rows > _INT32_MAX - _GPU_TILE[0]:
        raise Unsupported(f"rows={rows}: row numbers are int32")
    dtype = out_dtype or dtype_name((table if base is None else base).dtype)
    if rows == 0 or width == 0 or len(grid_thw) == 0:
        return jnp.zeros((rows, width), dtype)
    operands = (jnp.asarray(grid_thw), table) if base is None else (jnp.asarray(grid_thw), table, base)
    return _interpolate(
        *operands,
        merge_size=merge_size,
        mode=mode,
        align_corners=align_corners,
        out_dtype=dtype,
        out_rows=rows,
        table_height=table_height,
    )


@jit("pos_embed_interpolate")
def _interpolate(
    grid: jax.Array, table: jax.Array, *base: jax.Array, out_dtype: str, out_rows: int, **attrs: Any
) -> jax.Array:
    width = table.shape[1]
    # Clipping first keeps an invalid int64 entry invalid in int32.
    grid = jnp.clip(grid.T, -1, _INT32_MAX).astype(jnp.int32)
    grid = jnp.pad(grid, ((0, 0), (0, pl.next_power_of_2(grid.shape[1]) - grid.shape[1])))
    gpu_tile = _GPU_TILE[0], min(_GPU_TILE[1], pl.next_power_of_2(width))
    launch = partial(_launch, dtype=out_dtype, rows=out_rows, **attrs)
    native = partial(launch, tile=gpu_tile)
    interpreted = partial(launch, tile=(min(_CPU_TILE_ROWS, out_rows), width), interpret=True)
    return lax.platform_dependent(grid, table, *base, cpu=interpreted, cuda=native, rocm=native)


def _launch(
    grid: jax.Array,
    table: jax.Array,
    *base: jax.Array,
    tile: tuple[int, int],
    dtype: str,
    rows: int,
    table_height: int | None,
    interpret: bool = False,
    **attrs: Any,
) -> jax.Array:
    (cells, width), (tile_rows, tile_width) = table.shape, tile
    tiled = pl.BlockSpec(tile, lambda i, j: (i, j))
    return pl.pallas_call(
        partial(_kernel, sides=table_sides(cells, table_height), rows=rows, width=width, **attrs),
        out_shape=jax.ShapeDtypeStruct((rows, width), dtype),
        grid=(pl.cdiv(rows, tile_rows), pl.cdiv(width, tile_width)),
        in_specs=[
            pl.BlockSpec(grid.shape, lambda i, j: (0, 0)),
            pl.BlockSpec((cells, tile_width), lambda i, j: (0, j)),
            *(tiled for _ in base),
        ],
        out_specs=tiled,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4),
        name="pos_embed_interpolate",
    )(grid, table, *base)


def _kernel(
    grid_ref: Any,
    table_ref: Any,
    *refs: Any,
    sides: tuple[int, int],
    rows: int,
    width: int,
    merge_size: int,
    mode: str,
    align_corners: bool,
) -> None:
    *base_refs, out_ref = refs
    tile_rows, tile_width = out_ref.shape
    row = pl.program_id(0) * tile_rows + lax.iota(jnp.int32, tile_rows)
    inner = lax.iota(jnp.int32, tile_width)[None, :]
    in_width = pl.program_id(1) * tile_width + inner < width
    h, w, start, live, valid = _find_images(grid_ref, row, merge_size, max(sides), rows)
    y, x = patch(lax.rem(row - start, h * w), w, merge_size)
    total = jnp.zeros((tile_rows, tile_width), jnp.float32)
    taps_y, taps_x = axis_taps(y, h, sides[0], mode, align_corners), axis_taps(x, w, sides[1], mode, align_corners)
    for (cell_y, weight_y), (cell_x, weight_x) in product(taps_y, taps_x):
        weight = weight_y * weight_x
        cells = plgpu.load(
            table_ref.at[(cell_y * sides[1] + cell_x)[:, None], inner],
            mask=(live & (weight != 0))[:, None] & in_width,
            other=0,
        )
        total += weight[:, None] * cells.astype(jnp.float32)
    for base_ref in base_refs:
        total += plgpu.load(base_ref, mask=live[:, None] & in_width, other=0).astype(jnp.float32)
    # Rows of no image have read nothing and are zero.
    total = jnp.where(valid, total, jnp.nan)
    plgpu.store(out_ref, total.astype(out_ref.dtype), mask=(row < rows)[:, None] & in_width)


def _find_images(
    grid_ref: Any, row: jax.Array, merge_size: int, side: int, rows: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """(h, w, first row) of the image of each row, whether it has one, and whether all images are usable.

    `side` is the longer one of the table.
    """
    t, h, w = grid_ref[0, :], grid_ref[1, :], grid_ref[2, :]
    longest = _INT32_MAX // (2 * side) - 1  # the spec's limit, under which coordinates fit in int32
    # Divisions instead of products, which could overflow.
    room = lax.full_like(h, rows)
    fits = (w <= lax.div(room, jnp.maximum(h, 1))) & (t <= lax.div(room, jnp.maximum(h * w, 1)))
    usable = fits & (t > 0) & (h > 0) & (w > 0) & (jnp.maximum(h, w) <= longest)
    usable &= (divide(h, merge_size)[1] == 0) & (divide(w, merge_size)[1] == 0)
    unused = (t == 0) & (h == 0) & (w == 0)
    ends = jnp.cumsum(jnp.where(usable, t * h * w, 0), dtype=jnp.int32)
    # A sum of int32 sizes that first passes 2**31 is negative there.
    valid = jnp.min(((usable | unused) & (ends >= 0) & (ends <= rows)).astype(jnp.int32)) == 1

    before = ends[None, :] <= row[:, None]  # [tile_rows, images]
    image = jnp.sum(before, axis=1, dtype=jnp.int32)
    start = jnp.max(jnp.where(before, ends[None, :], 0), axis=1)
    live = valid & (image < grid_ref.shape[1])
    h, w = (plgpu.load(grid_ref.at[axis, image], mask=live, other=merge_size) for axis in (1, 2))
    return h, w, start, live, valid
