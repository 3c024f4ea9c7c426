"""`pos_embed_interpolate` in jax.numpy; the formula is the docstring of `polyfuse.spec.pos_embed_interpolate`.

`table` and `base` may be traced, vmapped, sharded and differentiated. `grid_thw` may be traced and vmapped if it
is an array; of a tuple only the number of images and the total of rows are compiled in.
"""

from collections.abc import Sequence
from itertools import product

import jax
import jax.numpy as jnp
from jax import lax

from polyfuse.reference._jax.compilation import jit
from polyfuse.reference._jax.interpolation import axis_taps, divide, patch
from polyfuse.spec import Capability, Unsupported, dtype_name
from polyfuse.spec.pos_embed_interpolate import table_sides

CAPABILITY = Capability(differentiable=True)

_INT32_MAX = 2**31 - 1


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
    if rows > _INT32_MAX:
        raise Unsupported(f"rows={rows}: row numbers are int32")
    dtype = out_dtype or dtype_name((table if base is None else base).dtype)
    if rows == 0 or table.shape[1] == 0 or len(grid_thw) == 0:
        return jnp.zeros((rows, table.shape[1]), dtype)
    return _interpolate(
        table,
        jnp.asarray(grid_thw),
        base,
        merge_size=merge_size,
        mode=mode,
        align_corners=align_corners,
        out_dtype=dtype,
        out_rows=rows,
        table_height=table_height,
    )


@jit("pos_embed_interpolate")
def _interpolate(
    table: jax.Array,
    grid: jax.Array,
    base: jax.Array | None,
    *,
    merge_size: int,
    mode: str,
    align_corners: bool,
    out_dtype: str,
    out_rows: int,
    table_height: int | None,
) -> jax.Array:
    table_rows, table_columns = table_sides(table.shape[0], table_height)
    # Clipping first keeps an invalid int64 entry invalid in int32.
    grid = jnp.clip(grid, -1, _INT32_MAX).astype(jnp.int32)
    ends, valid = _image_ends(grid, merge_size, max(table_rows, table_columns), out_rows)
    row = jnp.arange(out_rows, dtype=jnp.int32)
    image = jnp.searchsorted(ends, row, side="right", method="compare_all")
    live = image < len(grid)
    image = jnp.minimum(image, len(grid) - 1)
    t, h, w = jnp.where(live & valid, grid[image].T, jnp.array([[1], [merge_size], [merge_size]], jnp.int32))
    y, x = patch(lax.rem(row - (ends[image] - t * h * w), h * w), w, merge_size)
    # The cast comes before the gather so that gradients of the table accumulate in fp32.
    source = table.astype(jnp.float32)
    total = jnp.zeros((out_rows, table.shape[1]), jnp.float32)
    taps_y = axis_taps(y, h, table_rows, mode, align_corners)
    taps_x = axis_taps(x, w, table_columns, mode, align_corners)
    for (cell_y, weight_y), (cell_x, weight_x) in product(taps_y, taps_x):
        weight = (weight_y * weight_x)[:, None]
        cells = jnp.take(source, cell_y * table_columns + cell_x, axis=0, mode="clip")
        total += jnp.where(weight == 0, 0.0, weight * cells)
    if base is not None:
        total += base.astype(jnp.float32)
    total = jnp.where(live[:, None], total, 0.0)
    return jnp.where(valid, total, jnp.nan).astype(out_dtype)


def _image_ends(grid: jax.Array, merge_size: int, side: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """The row after each image's last one, and whether the images are valid and fit into `rows`.

    `side` is the longer one of the table.
    """
    t, h, w = grid.T
    longest = _INT32_MAX // (2 * side) - 1  # the spec's limit, under which coordinates fit in int32
    # Divisions instead of products, which could overflow.
    room = lax.full_like(h, rows)
    fits = (w <= lax.div(room, jnp.maximum(h, 1))) & (t <= lax.div(room, jnp.maximum(h * w, 1)))
    usable = fits & (jnp.min(grid, axis=1) > 0) & (jnp.maximum(h, w) <= longest)
    usable &= (divide(h, merge_size)[1] == 0) & (divide(w, merge_size)[1] == 0)
    unused = jnp.all(grid == 0, axis=1)
    ends = jnp.cumsum(jnp.where(usable, t * h * w, 0), dtype=jnp.int32)
    # A sum of int32 sizes that first passes 2**31 is negative there.
    return ends, jnp.all((usable | unused) & (ends >= 0) & (ends <= rows))
