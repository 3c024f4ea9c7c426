"""`gdn_conv_prep` in jax.numpy; the formula is the docstring of `polyfuse.spec.gdn_conv_prep`.

Every array may be traced, vmapped, sharded over its rows, and differentiated.
"""

import jax
import jax.numpy as jnp
from jax import lax

from polyfuse.reference._jax.compilation import jit
from polyfuse.reference._jax.projection import channels_of
from polyfuse.reference._jax.sequences import sequences, states_after, states_before
from polyfuse.reference.jax.gdn_post_conv import gates, normalised
from polyfuse.spec import Capability

CAPABILITY = Capability(differentiable=True)


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
    length, heads_v, before = len(x), len(A_log), weight.shape[1] - 1
    width = num_k_heads * head_k_dim
    channels = channels_of(num_k_heads, head_k_dim, interleaved)
    rows = channels(x)
    slots, state = states_before(initial_state, state_pool, state_indices, has_initial_state, cu_seqlens)
    c = _conv(rows, weight, bias, state, cu_seqlens)
    y = jax.nn.silu(c) if activation else c
    q, k, v = jnp.split(y, (width, 2 * width), axis=1)
    q, k = (part.reshape(length, num_k_heads, head_k_dim) for part in (q, k))
    v = v.reshape(length, heads_v, head_v_dim)
    if l2norm:
        q, k = (normalised(part, l2norm_eps) for part in (q, k))
    q, k, v = (part.astype(x.dtype) for part in (q, k, v))
    results = q, k, v, *gates(a, b, A_log, dt_bias, output_g_exp)
    states = states_after(x, channels, state, cu_seqlens, before, output_final_state, state_pool, slots)
    return *results, *states


def _conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    state: jax.Array | None,
    cu_seqlens: jax.Array | None,
) -> jax.Array:
    """c [L, C] in float32. A state may have more columns than the conv looks back."""
    before = weight.shape[1] - 1
    number, age = (part[:, None] for part in sequences(len(x), cu_seqlens))
    c = x.astype(jnp.float32) * weight[:, before].astype(jnp.float32)
    for lag in range(1, before + 1):
        tap = lax.pad(x, jnp.zeros((), x.dtype), ((lag, -lag, 0), (0, 0, 0))).astype(jnp.float32)
        earlier = jnp.zeros_like(tap)
        if state is not None:
            kept = state[number[:, 0], :, state.shape[2] + age[:, 0] - lag].astype(jnp.float32)
            earlier = jnp.where((number >= 0) & (number < len(state)), kept, earlier)
        c += jnp.where(age < lag, earlier, tap) * weight[:, before - lag].astype(jnp.float32)
    return c if bias is None else c + bias.astype(jnp.float32)
