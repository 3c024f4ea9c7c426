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
    def layout(self) -> Any:
        """Which warp, lane and register holds an element."""
        per_warp = LANES * self.vector // self.width  # rows
        every = (WARPS * per_warp, self.width)
        if per_warp == 1:
            inner, warps, lanes = ((self.vector,),), (-3,), (-2,)
        else:
            inner, warps, lanes = ((per_warp, self.width), (self.vector,)), (-5,), (-3, -2)
        tiling = plgpu.Tiling((every, *inner))
        return plgpu.Layout.TILED(tiling, warp_dims=warps, lane_dims=lanes, vector_dim=-1)

    def load(self, ref: Any) -> jax.Array:
        """Return a tile of global memory, in the dtype it has there."""
        return _load(ref, layout=self.layout, optimized=False)

    def across(self, values: jax.Array) -> jax.Array:
        """Return a value for each row [rows] as a tile."""
        return plgpu.layout_cast(lax.broadcast_in_dim(values, (self.rows, self.width), (0,)), self.layout)


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
