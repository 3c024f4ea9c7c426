"""`gdn_post_conv` as one Pallas kernel; the formula is the docstring of `polyfuse.spec.gdn_post_conv`.

A program takes some rows, and of these an equal share of the heads of q and k, of the columns of v and of the gates.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from polyfuse.reference._jax.compilation import jit
from polyfuse.reference.pallas import mosaic
from polyfuse.spec import FP32_TINY, Capability, Unsupported

# No TPU: Mosaic cannot gather columns by a vector of column numbers.
CAPABILITY = Capability(devices=("cpu", "cuda", "rocm"), min_arch={"cuda": (8, 0)}, interpreted=("cpu",))

_GPU_TILE = 2048  # elements of q, and of k
_GPU_TILE_WIDTH = 512
_GPU_TILE_VALUES = 1024  # columns of v
_CPU_TILE_ROWS = 8192  # the interpreter pays per program and copies the whole result each time


@jit("gdn_post_conv")
def gdn_post_conv(
    conv_out: jax.Array,
    a: jax.Array,
    b: jax.Array,
    A_log: jax.Array,
    dt_bias: jax.Array,
    *,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool = True,
    l2norm_eps: float = 1e-6,
    output_g_exp: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """q, k [L, H, K], v [L, HV, V], g, beta [L, HV]."""
    kernels = mosaic.preferred("gdn_post_conv")
    return fused(
        _load,
        _spec,
        kernels.kernel_of if kernels else None,
        conv_out,
        (a, b, A_log, dt_bias),
        name="gdn_post_conv",
        dtype=conv_out.dtype,
        heads=num_k_heads,
        size=head_k_dim,
        size_v=head_v_dim,
        l2norm=l2norm,
        eps=l2norm_eps,
        output_g_exp=output_g_exp,
    )


def _spec(conv_out: jax.Array, rows: int) -> pl.BlockSpec:
    return pl.BlockSpec((rows, conv_out.shape[1]), lambda j, i: (i, 0))


def _load(conv_ref: Any, row: jax.Array, column: jax.Array, mask: jax.Array) -> jax.Array:
    return plgpu.load(conv_ref.at[row, column], mask=mask, other=0)


def fused(
    load: Callable[..., jax.Array],
    specs: Callable[[Any, int], Any],
    kernel_of: Callable[..., Callable[..., Any] | None] | None,
    source: Any,
    gates: Sequence[jax.Array],
    *,
    name: str,
    dtype: Any,
    heads: int,
    size: int,
    size_v: int,
    **attrs: Any,
) -> Any:
    """q, k, v, g, beta of rows [q | k | v] that the kernel `name` loads with `load(refs, row, column, mask)`.

    The refs are those of the array or arrays in `source`, with the block specs `specs(source, rows)` for programs of so
    many rows; `row` counts from the program's first. The gates are a, b (in either of their shapes), A_log,
    dt_bias. On CUDA the kernel that `kernel_of` returns for a call, if any, takes its place. Raises `Unsupported` for
    no value heads.
    """
    a, b, *per_head = gates
    length, heads_v = len(a), len(per_head[0])
    gates = *(part.reshape(length, heads_v) for part in (a, b)), *per_head
    if heads_v == 0:
        raise Unsupported("HV=0: a kernel cannot have an empty output")
    if length == 0:
        qk, v = (jnp.zeros((0, *dims), dtype) for dims in ((heads, size), (heads_v, size_v)))
        gate = jnp.zeros((0, heads_v), jnp.float32)
        return qk, qk, v, gate, gate
    values = heads_v * size_v
    lanes = pl.next_power_of_2(size)
    tile_heads = min(pl.next_power_of_2(heads), max(1, _GPU_TILE_WIDTH // lanes))
    tile_values = min(pl.next_power_of_2(values), _GPU_TILE_VALUES)
    shares = max(pl.cdiv(heads, tile_heads), pl.cdiv(values, tile_values))
    attrs |= {"dtype": dtype, "heads": heads, "size": size, "values": values}
    launch = partial(_launch, load=load, specs=specs, name=name, **attrs)
    native = partial(
        launch,
        rows=max(1, min(_GPU_TILE // (tile_heads * lanes), 2 * _GPU_TILE // tile_values)),
        shares=shares,
        tiles=(tile_heads, lanes, tile_values, pl.next_power_of_2(pl.cdiv(heads_v, shares))),
    )
    on_cuda = kernel_of and kernel_of(source, *gates, **attrs)
    interpreted = partial(
        launch,
        rows=min(_CPU_TILE_ROWS, length),
        shares=1,
        tiles=(heads, size, values, heads_v),
        interpret=True,
    )
    q, k, v, g, beta = lax.platform_dependent(source, *gates, cpu=interpreted, cuda=on_cuda or native, rocm=native)
    return q, k, v.reshape(length, heads_v, size_v), g, beta


def _launch(
    source: Any,
    *gates: jax.Array,
    load: Callable[..., jax.Array],
    specs: Callable[[Any, int], Any],
    name: str,
    dtype: Any,
    rows: int,
    shares: int,
    tiles: tuple[int, int, int, int],
    heads: int,
    size: int,
    values: int,
    interpret: bool = False,
    **attrs: Any,
) -> Any:
    """`tiles` are the heads, elements of a head, columns of v, and gates of a program."""
    length, heads_v = gates[0].shape
    tile_heads, lanes, tile_values, tile_gates = tiles
    qk_spec = pl.BlockSpec((rows, tile_heads, lanes), lambda j, i: (i, j, 0))
    gate_spec = pl.BlockSpec((rows, tile_gates), lambda j, i: (i, j))
    head_spec = pl.BlockSpec((tile_gates,), lambda j, i: (j,))
    qk = jax.ShapeDtypeStruct((length, heads, size), dtype)
    gate = jax.ShapeDtypeStruct((length, heads_v), jnp.float32)
    return pl.pallas_call(
        partial(_kernel, load=load, length=length, heads=heads, size=size, values=values, heads_v=heads_v, **attrs),
        out_shape=(qk, qk, jax.ShapeDtypeStruct((length, values), dtype), gate, gate),
        grid=(shares, pl.cdiv(length, rows)),
        in_specs=[specs(source, rows), gate_spec, gate_spec, head_spec, head_spec],
        out_specs=(qk_spec, qk_spec, pl.BlockSpec((rows, tile_values), lambda j, i: (i, j)), gate_spec, gate_spec),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4),
        name=name,
    )(source, *gates)


def _kernel(
    source: Any,
    a_ref: Any,
    b_ref: Any,
    A_log_ref: Any,
    dt_bias_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    g_ref: Any,
    beta_ref: Any,
    *,
    load: Callable[..., jax.Array],
    length: int,
    heads: int,
    size: int,
    values: int,
    heads_v: int,
    l2norm: bool,
    eps: float,
    output_g_exp: bool,
) -> None:
    share = pl.program_id(0)
    rows, tile_heads, lanes = q_ref.shape
    row = lax.iota(jnp.int32, rows)
    live = pl.program_id(1) * rows + row < length
    head = share * tile_heads + lax.iota(jnp.int32, tile_heads)[:, None]
    lane = lax.iota(jnp.int32, lanes)[None, :]
    inside = live[:, None, None] & ((head < heads) & (lane < size))[None]
    for first, ref in ((0, q_ref), (heads, k_ref)):
        column = (first + head) * size + lane
        x = load(source, row[:, None, None], column[None], inside)
        x = _normalised(x.astype(jnp.float32), eps) if l2norm else x
        plgpu.store(ref, x.astype(ref.dtype), mask=inside)

    column = share * v_ref.shape[1] + lax.iota(jnp.int32, v_ref.shape[1])[None, :]
    inside = live[:, None] & (column < values)
    v = load(source, row[:, None], 2 * heads * size + column, inside)
    plgpu.store(v_ref, v.astype(v_ref.dtype), mask=inside)

    mine = share * a_ref.shape[1] + lax.iota(jnp.int32, a_ref.shape[1]) < heads_v
    inside = live[:, None] & mine[None, :]
    a, b = (plgpu.load(ref, mask=inside, other=0).astype(jnp.float32) for ref in (a_ref, b_ref))
    A_log, dt_bias = (
        plgpu.load(ref, mask=mine, other=0).astype(jnp.float32)[None, :] for ref in (A_log_ref, dt_bias_ref)
    )
    g = -_decay_rate(a + dt_bias, A_log)
    plgpu.store(g_ref, jnp.exp(g) if output_g_exp else g, mask=inside)
    plgpu.store(beta_ref, 1 / (1 + jnp.exp(-b)), mask=inside)


def _normalised(x: jax.Array, eps: float) -> jax.Array:
    """Over the last axis."""
    total = jnp.sum(x * x, axis=-1)[:, :, None]
    return x * lax.rsqrt(total + max(eps, FP32_TINY))


def _decay_rate(x: jax.Array, log_rate: jax.Array) -> jax.Array:
    """exp(log_rate) * softplus(x)."""
    # Below -20 softplus(x) is exp(x), which may underflow where the product does not.
    softplus = jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))
    return jnp.where(x < -20.0, jnp.exp(x + log_rate), jnp.exp(log_rate) * softplus)
