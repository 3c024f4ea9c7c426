"""`gdn_conv_prep` as one Pallas kernel; the formula is the docstring of `polyfuse.spec.gdn_conv_prep`.

The kernel of `gdn_post_conv`, which computes y here where it loads it there. Where each row's sequence begins is found
before it, and the final state beside it, in jax.numpy; there too a pool's states are gathered and scattered.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from polyfuse.reference._jax.compilation import jit
from polyfuse.reference._jax.projection import channels_of
from polyfuse.reference._jax.sequences import sequences, states_after, states_before
from polyfuse.reference.pallas import mosaic
from polyfuse.reference.pallas.gdn_post_conv import CAPABILITY as CAPABILITY
from polyfuse.reference.pallas.gdn_post_conv import fused


@jit("gdn_conv_prep")
def gdn_conv_prep(
    x: jax.Array,
    weight: jax.Array,
    a: jax.Array,
    b: jax.Array,
    A_log: jax.Array,
    dt_bias: jax.Array,
    *,
    bias: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    state_pool: jax.Array | None = None,
    state_indices: jax.Array | None = None,
    has_initial_state: jax.Array | None = None,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool = True,
    l2norm_eps: float = 1e-6,
    output_g_exp: bool = False,
    output_final_state: bool = False,
    interleaved: bool = False,
    activation: str | None = "silu",
) -> tuple[jax.Array, ...]:
    """q, k [L, H, K], v [L, HV, V], g, beta [L, HV], final_state [S, C, W - 1]; and the pool, if there is one."""
    number, age = sequences(len(x), cu_seqlens)
    sources = {"x": x, "weight": weight, "age": age, "number": number}
    if bias is not None:
        sources["bias"] = bias
    slots, state = states_before(initial_state, state_pool, state_indices, has_initial_state, cu_seqlens)
    if state is not None:
        sources["state"] = state
    per_head = x.shape[1] // num_k_heads if interleaved else 0
    kernels = mosaic.preferred("gdn_conv_prep")
    results = fused(
        partial(_load, heads=num_k_heads, size=head_k_dim, per_head=per_head, activation=activation),
        _specs,
        partial(kernels.kernel_of, interleaved=interleaved, activation=activation) if kernels else None,
        sources,
        (a, b, A_log, dt_bias),
        name="gdn_conv_prep",
        dtype=x.dtype,
        heads=num_k_heads,
        size=head_k_dim,
        size_v=head_v_dim,
        l2norm=l2norm,
        eps=l2norm_eps,
        output_g_exp=output_g_exp,
    )
    channels = channels_of(num_k_heads, head_k_dim, interleaved)
    before = weight.shape[1] - 1
    states = states_after(x, channels, state, cu_seqlens, before, output_final_state, state_pool, slots)
    return *results, *states


def _specs(sources: dict[str, jax.Array], rows: int) -> dict[str, pl.BlockSpec]:
    """Of `age` and `number` a program's rows; all of the others."""
    block = pl.BlockSpec((rows,), lambda j, i: (i,))
    return {name: block if name in ("age", "number") else _whole(array) for name, array in sources.items()}


def _whole(array: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda j, i: (0,) * array.ndim)


def _place(channel: jax.Array, heads: int, size: int, per_head: int) -> jax.Array:
    """The column of a channel of [q | k | v] in rows of key heads [q | k | v | z], each `per_head` columns."""
    values = (per_head - 2 * size) // 2
    of_v = channel - 2 * heads * size
    is_k = channel >= heads * size
    qk = channel - jnp.where(is_k, heads * size, 0)
    in_qk = qk // size * per_head + qk % size + jnp.where(is_k, size, 0)
    return jnp.where(of_v < 0, in_qk, of_v // values * per_head + 2 * size + of_v % values)


def _load(
    refs: dict[str, Any],
    row: jax.Array,
    column: jax.Array,
    mask: jax.Array,
    *,
    heads: int,
    size: int,
    per_head: int,
    activation: str | None,
) -> jax.Array:
    """y in float32, of some channels of a program's rows. `per_head` is 0 where x is not interleaved."""
    x_ref, weight_ref, state_ref = refs["x"], refs["weight"], refs.get("state")
    before = weight_ref.shape[1] - 1
    row = pl.program_id(1) * row.size + row
    live, known = row.ravel() < x_ref.shape[0], column < weight_ref.shape[0]
    age = plgpu.load(refs["age"], mask=live, other=0).reshape(row.shape)
    number = plgpu.load(refs["number"], mask=live, other=-1).reshape(row.shape)
    place = _place(column, heads, size, per_head) if per_head else column
    c = 0.0
    for lag in range(before, -1, -1):
        inside = age >= lag
        tap = plgpu.load(x_ref.at[row - lag, place], mask=mask & inside, other=0).astype(jnp.float32)
        if state_ref is not None and lag:
            kept = mask & ~inside & (number >= 0) & (number < state_ref.shape[0])
            earlier = plgpu.load(state_ref.at[number, column, state_ref.shape[2] + age - lag], mask=kept, other=0)
            tap = jnp.where(inside, tap, earlier.astype(jnp.float32))
        part = plgpu.load(weight_ref.at[column, before - lag], mask=known, other=0)
        c += tap * part.astype(jnp.float32)
    if "bias" in refs:
        c += plgpu.load(refs["bias"].at[column], mask=known, other=0).astype(jnp.float32)
    return jnp.where(mask, c / (1 + jnp.exp(-c)) if activation else c, 0.0)
