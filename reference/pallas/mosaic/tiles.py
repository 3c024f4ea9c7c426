"""What the Mosaic GPU kernels share: tiles [rows, width] whose rows lie behind one another in global memory.

A program is one warpgroup of 4 warps. A warp has whole rows of a tile, and a lane `vector` neighbouring elements of a
row: loads and stores are coalesced, and sums and maxima over a row stay inside a warp. Tiles go from global memory into
registers and back without shared memory; the latency is hidden by the many programs that share a multiprocessor.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPS, LANES = 4, 32

# The index of a load is an argument that JAX 0.10 requires and JAX 0.11 deprecates.
_load: Any = plgpu.load
if inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty:
    _load = partial(plgpu.load, idx=...)


class Tile(NamedTuple):
    """Rows of a tile, elements of a row, and neighbouring elements that one lane has of each row."""

    rows: int
    width: int
    vector: int

    @property
    def _per_warp(self) -> int:
        """Rows that a warp holds at once."""
        return LANES * self.vector // self.width

    @property
    def layout(self) -> Any:
        """Which warp, lane and register holds an element."""
        every = (WARPS * self._per_warp, self.width)
        if self._per_warp == 1:
            inner, warps, lanes = ((self.vector,),), (-3,), (-2,)
        else:
            inner, warps, lanes = ((self._per_warp, self.width), (self.vector,)), (-5,), (-3, -2)
        tiling = plgpu.Tiling((every, *inner))
        return plgpu.Layout.TILED(tiling, warp_dims=warps, lane_dims=lanes, vector_dim=-1)

    def load(self, ref: Any) -> jax.Array:
        """Return a tile of global memory, in the dtype it has there."""
        return _load(ref, layout=self.layout, optimized=False)

    def load_row(self, ref: Any) -> jax.Array:
        """Return a row [width] of global memory, which every warp holds."""
        tiling = plgpu.Tiling(((self.width,), (self.vector,)))
        lanes = (-2,) if self._per_warp == 1 else (plgpu.Replicated(self._per_warp), -2)
        layout = plgpu.Layout.TILED(tiling, warp_dims=(plgpu.Replicated(WARPS),), lane_dims=lanes, vector_dim=-1)
        return _load(ref, layout=layout, optimized=False)

    def across(self, values: jax.Array) -> jax.Array:
        """Return a tile with one value in each of its rows [rows]."""
        return self._spread(values, 0)

    def down(self, row: jax.Array) -> jax.Array:
        """Return a tile with the same row [width] everywhere."""
        return self._spread(row, 1)

    def zeros(self) -> jax.Array:
        """Return a tile of zeros in float32."""
        return plgpu.layout_cast(jnp.zeros((self.rows, self.width), jnp.float32), self.layout)

    def _spread(self, x: jax.Array, axis: int) -> jax.Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (self.rows, self.width), (axis,)), self.layout)


def tile_of(count: int, width: int, most: int) -> Tile | None:
    """Return the tile of at most `most` elements that divides `count` rows of `width` elements, or None.

    The width must be 32, 64, 128 or 256, and the rows a multiple of what 4 warps hold at once: 1024 elements, or 512.
    """
    for vector in (8, 4):
        if width not in (32, 64, 128, 256) or width > LANES * vector:
            continue
        least = WARPS * LANES * vector // width
        if count and count % least == 0:
            rows = least
            while count % (2 * rows) == 0 and 2 * rows * width <= most:
                rows *= 2
            return Tile(rows, width, vector)
    return None


def launch(
    body: Callable[..., None],
    out_type: Sequence[jax.ShapeDtypeStruct],
    programs: int,
    *arrays: jax.Array,
    name: str,
) -> Any:
    """Run `body(program, *refs of arrays, *refs of results)` in each of `programs` programs.

    No program reads a result. Exponentials and reciprocal roots are the hardware's, each within 2 ulp.
    """

    def kernel(*refs: Any) -> None:
        body(lax.axis_index("program"), *refs)

    return plgpu.kernel(
        kernel,
        out_type=tuple(out_type),
        grid=(programs,),
        grid_names=("program",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,  # there is no shared memory, and no result is read
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(*arrays)
