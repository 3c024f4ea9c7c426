"""`gdn_in_proj` as one Pallas kernel over all weights; the formula is that of `polyfuse.spec.gdn_in_proj`."""

from functools import partial
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
    w_z: jax.Array | None = None,
    w_a: jax.Array | None = None,
    bias_qkvz: jax.Array | None = None,
    bias_ba: jax.Array | None = None,
    strategy: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """qkvz and ba, each rounded once."""
    lead, hidden = x.shape[:-1], x.shape[-1]
    # Zero-size operands cannot enter a kernel: weights without rows are left out, and so is a result without elements.
    parts = [[w for w in pair if w is not None and len(w)] for pair in ((w_qkvz, w_z), (w_ba, w_a))]
    biases = [
        jnp.zeros(sum(map(len, weights)), x.dtype) if bias is None else bias
        for weights, bias in zip(parts, (bias_qkvz, bias_ba), strict=True)
    ]
    results = [jnp.broadcast_to(bias, (*lead, len(bias))) for bias in biases]
    there = [i for i, result in enumerate(results) if result.size and hidden]
    if there:
        computed = _project(x.reshape(-1, hidden), [parts[i] for i in there], [biases[i] for i in there])
        for i, result in zip(there, computed, strict=True):
            results[i] = result.reshape(*lead, -1)
    return results[0], results[1]


@jax.jit
def _project(x: jax.Array, parts: list[list[jax.Array]], biases: list[jax.Array]) -> list[jax.Array]:
    native = partial(_launch, tile=_GPU_TILE)
    return lax.platform_dependent(
        x, parts, biases, cpu=partial(_launch, tile=_CPU_TILE, interpret=True), cuda=native, rocm=native
    )


def _launch(
    x: jax.Array,
    parts: list[list[jax.Array]],
    biases: list[jax.Array],
    tile: tuple[int, int, int],
    interpret: bool = False,
) -> list[jax.Array]:
    """x @ [the weights of a part].T + its bias, of each part."""
    weights = [w for part in parts for w in part]
    (rows, hidden), most = x.shape, max(map(len, weights))
    tile_rows, tile_n, tile_k = (
        min(t, max(16, pl.next_power_of_2(n))) for t, n in zip(tile, (rows, most, hidden), strict=True)
    )
    operands = (x, *weights, *biases)
    shapes = [jax.ShapeDtypeStruct((rows, len(bias)), x.dtype) for bias in biases]
    return pl.pallas_call(
        partial(_kernel, counts=[len(part) for part in parts], tile_rows=tile_rows, tile_n=tile_n, tile_k=tile_k),
        out_shape=shapes,
        grid=(pl.cdiv(rows, tile_rows), sum(pl.cdiv(len(w), tile_n) for w in weights)),
        in_specs=[pl.BlockSpec(a.shape, lambda i, j, n=a.ndim: (0,) * n) for a in operands],
        out_specs=[pl.BlockSpec(s.shape, lambda i, j: (0, 0)) for s in shapes],
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        name="gdn_in_proj",
    )(*operands)


def _kernel(x_ref: Any, *refs: Any, counts: list[int], tile_rows: int, tile_n: int, tile_k: int) -> None:
    """A block of the columns of one weight. `counts`: how many weights each result has, in the order of `refs`."""
    weights, others = list(refs[: sum(counts)]), refs[sum(counts) :]
    biases, outs = others[: len(counts)], others[len(counts) :]
    row = (pl.program_id(0) * tile_rows + lax.iota(jnp.int32, tile_rows))[:, None]
    block = pl.program_id(1)  # of all columns; then counted from the first one of each weight
    for count, b_ref, out_ref in zip(counts, biases, outs, strict=True):
        first = 0  # where in the result a weight's columns begin
        for _ in range(count):
            w_ref = weights.pop(0)
            blocks = pl.cdiv(w_ref.shape[0], tile_n)
            column = block * tile_n + lax.iota(jnp.int32, tile_n)
            run = partial(_block, x_ref, w_ref, b_ref, out_ref, row, column, first, tile_k)
            pl.when((block >= 0) & (block < blocks))(run)
            block, first = block - blocks, first + w_ref.shape[0]


def _block(
    x_ref: Any, w_ref: Any, b_ref: Any, out_ref: Any, row: jax.Array, column: jax.Array, first: int, tile_k: int
) -> None:
    """out[row, first + column] = x[row] @ w[column].T + bias[first + column]."""
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
    acc += plgpu.load(b_ref.at[first + column], mask=column < columns, other=0).astype(jnp.float32)[None, :]
    mask = (row < rows) & (column < columns)[None, :]
    plgpu.store(out_ref.at[row, first + column[None, :]], acc.astype(out_ref.dtype), mask=mask)
