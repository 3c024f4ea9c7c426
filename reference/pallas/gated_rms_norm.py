"""`gated_rms_norm` as one Pallas kernel; the formula is the docstring of `polyfuse.spec.gated_rms_norm`.

A program takes some whole rows.
"""

from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from polyfuse.reference._jax.compilation import jit
from polyfuse.spec import FP32_TINY, Capability

# No TPU: its blocks are multiples of (8, 128).
CAPABILITY = Capability(
    devices=("cpu", "cuda", "rocm"), min_arch={"cuda": (8, 0)}, ranges={"V": (0, 2**14)}, interpreted=("cpu",)
)

_GPU_TILE = 2048  # elements
_WARP_ELEMENTS = 512  # at most, in a long row
_CPU_TILE_ROWS = 8192  # the interpreter pays per program and copies the whole result each time


@jit("gated_rms_norm")
def gated_rms_norm(
    x: jax.Array,
    gate: jax.Array,
    weight: jax.Array,
    *,
    eps: float = 1e-6,
    activation: str = "silu",
    weight_offset: float = 0.0,
) -> jax.Array:
    """y [..., V]."""
    if x.size == 0:
        return jnp.zeros(x.shape, x.dtype)
    *lead, width = x.shape
    shape = prod(lead), width
    lanes = pl.next_power_of_2(width)
    launch = partial(_launch, eps=eps, activation=activation, weight_offset=weight_offset)
    native = partial(launch, tile=(max(1, _GPU_TILE // lanes), lanes))
    interpreted = partial(launch, tile=(min(_CPU_TILE_ROWS, shape[0]), width), interpret=True)
    y = lax.platform_dependent(x.reshape(shape), gate.reshape(shape), weight, cpu=interpreted, cuda=native, rocm=native)
    return y.reshape(x.shape)


def _launch(
    x: jax.Array, gate: jax.Array, weight: jax.Array, *, tile: tuple[int, int], interpret: bool = False, **attrs: Any
) -> Any:
    rows, width = x.shape
    row_spec = pl.BlockSpec(tile, lambda i: (i, 0))
    return pl.pallas_call(
        partial(_kernel, rows=rows, width=width, **attrs),
        out_shape=jax.ShapeDtypeStruct((rows, width), x.dtype),
        grid=(pl.cdiv(rows, tile[0]),),
        in_specs=[row_spec, row_spec, pl.BlockSpec((tile[1],), lambda i: (0,))],
        out_specs=row_spec,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=max(4, tile[1] // _WARP_ELEMENTS)),
        name="gated_rms_norm",
    )(x, gate, weight)


def _kernel(
    x_ref: Any,
    gate_ref: Any,
    weight_ref: Any,
    y_ref: Any,
    *,
    rows: int,
    width: int,
    eps: float,
    activation: str,
    weight_offset: float,
) -> None:
    tile_rows, lanes = x_ref.shape
    row = pl.program_id(0) * tile_rows + lax.iota(jnp.int32, tile_rows)
    inside = lax.iota(jnp.int32, lanes) < width
    live = (row < rows)[:, None] & inside[None, :]
    x, gate = (plgpu.load(ref, mask=live, other=0).astype(jnp.float32) for ref in (x_ref, gate_ref))
    weight = plgpu.load(weight_ref, mask=inside, other=0).astype(jnp.float32)
    mean = jnp.sum(x * x, axis=-1)[:, None] / width
    normalised = x * lax.rsqrt(mean + max(eps, FP32_TINY))
    act = 1 / (1 + jnp.exp(-gate))
    if activation == "silu":
        act = gate * act
    y = normalised * (weight + weight_offset)[None, :] * act
    plgpu.store(y_ref, y.astype(y_ref.dtype), mask=live)
