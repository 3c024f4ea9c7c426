"""`pos_embed_interpolate` as one Pallas kernel; the formula is the docstring of `polyfuse.spec.pos_embed_interpolate`.

Each program computes a tile of rows x columns of the result. It finds the image of each of its rows in the
grid itself, so that one launch serves all images and nothing is computed on the host.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import isqrt
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from polyfuse.spec import Capability, Unsupported, dtype_name

# No TPU: Mosaic has no gather of table rows by a vector of row numbers.
CAPABILITY = Capability(devices=("cpu", "cuda", "rocm"), min_arch={"cuda": (8, 0)})

_INT32_MAX = 2**31 - 1
_GPU_TILE = (32, 128)
_CPU_TILE = (8192, 2048)  # the interpreter's cost is per program, so few and large ones


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
) -> jax.Array:
    """[rows, D], rounded once."""
    rows = sum(t * h * w for t, h, w in grid_thw) if out_rows is None else out_rows
    if rows > _INT32_MAX:
        raise Unsupported(f"rows={rows}: row numbers are int32")
    dtype = out_dtype or dtype_name((table if base is None else base).dtype)
    if rows == 0 or table.shape[1] == 0 or len(grid_thw) == 0:
        return jnp.zeros((rows, table.shape[1]), dtype)
    # Clipping first keeps an invalid int64 entry invalid in int32.
    grid = jnp.clip(jnp.asarray(grid_thw), -1, _INT32_MAX).astype(jnp.int32)
    kernel = partial(
        _kernel,
        side=isqrt(table.shape[0]),
        rows=rows,
        width=table.shape[1],
        images=len(grid_thw),
        merge_size=merge_size,
        mode=mode,
        align_corners=align_corners,
    )
    ...
