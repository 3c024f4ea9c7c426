"""`gdn_in_proj` as one Pallas kernel over both weights; the formula is that of `polyfuse.spec.gdn_in_proj`."""

from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from polyfuse.spec import Capability

# No TPU: the masked loads are Triton's.
CAPABILITY = Capability(
    devices=("cpu", "cuda", "rocm"),
    min_arch={"cuda": (8, 0)},
    attrs={"strategy": ("auto", "fused")},
    interpreted=("cpu",),
)

_GPU_TILE = (16, 64, 128)  # rows, columns, hidden
_CPU_TILE = (256, 4096, 4096)


def gdn_in_proj(
    x: jax.Array,
    w_qkvz: jax.Array,
    w_ba: jax.Array,
    *,
    bias_qkvz: jax.Array | None = None,
    bias_ba: jax.Array | None = None,
    strategy: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """qkvz and ba, each rounded once."""
    lead, (n1, hidden), n2 = x.shape[:-1], w_qkvz.shape, len(w_ba)
    rows = prod(lead)
    # Zero-size operands cannot enter a kernel: one row of zeros stands for a weight without rows.
    w_ba, bias_ba = (w_ba, bias_ba) if n2 else (jnp.zeros((1, hidden), x.dtype), None)
    if rows == 0 or n1 == 0 or hidden == 0:
        large, small = (
            jnp.zeros((rows, n), jnp.float32) + (0 if b is None else b)
            for n, b in ((n1, bias_qkvz), (len(w_ba), bias_ba))
        )
        large, small = large.astype(x.dtype), small.astype(x.dtype)
    else:
        zeros = [jnp.zeros(len(w), x.dtype) if b is None else b for w, b in ((w_qkvz, bias_qkvz), (w_ba, bias_ba))]
        large, small = _project(x.reshape(rows, hidden), w_qkvz, w_ba, *zeros)
    return large.reshape(*lead, n1), small[:, :n2].reshape(*lead, n2)


@jax.jit
def _project(*operands: jax.Array) -> list[jax.Array]:
    native = partial(_launch, tile=_GPU_TILE)
    return lax.platform_dependent(
        *operands, cpu=partial(_launch, tile=_CPU_TILE, interpret=True), cuda=native, rocm=native
    )


def _launch(x: jax.Array, *weights: jax.Array, tile: tuple[int, int, int], interpret: bool = False) -> list[jax.Array]:
    (rows, hidden), (n1, n2) = x.shape, (len(w) for w in weights[:2])
    tile_rows, tile_n, tile_k = (
        min(t, max(16, pl.next_power_of_2(n))) for t, n in zip(tile, (rows, n1, hidden), strict=True)
    )
    whole = [pl.BlockSpec(a.shape, lambda i, j, n=a.ndim: (0,) * n) for a in (x, *weights)]
    shapes = [jax.ShapeDtypeStruct((rows, n), x.dtype) for n in (n1, n2)]
    return pl.pallas_call(
        partial(_kernel, tile_rows=tile_rows, tile_n=tile_n, tile_k=tile_k),
        out_shape=shapes,
        grid=(pl.cdiv(rows, tile_rows), pl.cdiv(n1, tile_n) + pl.cdiv(n2, tile_n)),
        in_specs=whole,
        out_specs=[pl.BlockSpec(s.shape, lambda i, j: (0, 0)) for s in shapes],
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        name="gdn_in_proj",
    )(x, *weights)


def _kernel(
    x_ref: Any,
    w1_ref: Any,
    w2_ref: Any,
    b1_ref: Any,
    b2_ref: Any,
    out1_ref: Any,
    out2_ref: Any,
    *,
    tile_rows: int,
    tile_n: int,
    tile_k: int,
) -> None:
    blocks = pl.cdiv(w1_ref.shape[0], tile_n)
    block = pl.program_id(1)
    row = (pl.program_id(0) * tile_rows + lax.iota(jnp.int32, tile_rows))[:, None]
    column = lax.iota(jnp.int32, tile_n)

    @pl.when(block < blocks)
    def _() -> None:
        _block(x_ref, w1_ref, b1_ref, out1_ref, row, block * tile_n + column, tile_k)

    @pl.when(block >= blocks)
    def _() -> None:
        _block(x_ref, w2_ref, b2_ref, out2_ref, row, (block - blocks) * tile_n + column, tile_k)


def _block(x_ref: Any, w_ref: Any, b_ref: Any, out_ref: Any, row: jax.Array, column: jax.Array, tile_k: int) -> None:
    """out[row, column] = x[row] @ w[column].T + bias[column]."""
    (rows, hidden), columns = x_ref.shape, w_ref.shape[0]

    def step(i: jax.Array, acc: jax.Array) -> jax.Array:
        k = i * tile_k + lax.iota(jnp.int32, tile_k)
        x = plgpu.load(x_ref.at[row, k[None, :]], mask=(row < rows) & (k < hidden)[None, :], other=0)
        w = plgpu.load(
            w_ref.at[column[None, :], k[:, None]], mask=(column < columns)[None, :] & (k < hidden)[:, None], other=0
        )
        return acc + lax.dot_general(
            x, w, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )

    acc = lax.fori_loop(0, pl.cdiv(hidden, tile_k), step, jnp.zeros((len(row), len(column)), jnp.float32))
    acc += plgpu.load(b_ref.at[column], mask=column < columns, other=0).astype(jnp.float32)[None, :]
    mask = (row < rows) & (column < columns)[None, :]
    plgpu.store(out_ref.at[row, column[None, :]], acc.astype(out_ref.dtype), mask=mask)
