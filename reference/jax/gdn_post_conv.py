"""`gdn_post_conv` in jax.numpy; the formula is the docstring of `polyfuse.spec.gdn_post_conv`.

May be traced, vmapped, sharded over rows, and differentiated in every array.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from polyfuse.spec import Capability

CAPABILITY = Capability(differentiable=True)


@partial(
    jax.jit,
    static_argnames=("num_k_heads", "head_k_dim", "head_v_dim", "l2norm", "l2norm_eps", "output_g_exp"),
)
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
    length, heads_v = a.shape
    width = num_k_heads * head_k_dim
    q, k, v = jnp.split(conv_out, (width, 2 * width), axis=1)
    q, k = (part.reshape(length, num_k_heads, head_k_dim) for part in (q, k))
    if l2norm:
        q, k = _normalised(q, l2norm_eps), _normalised(k, l2norm_eps)
    a, b, A_log, dt_bias = (part.astype(jnp.float32) for part in (a, b, A_log, dt_bias))
    g = _decay(a + dt_bias, A_log)
    return (
        q,
        k,
        v.reshape(length, heads_v, head_v_dim),
        jnp.exp(g) if output_g_exp else g,
        jax.nn.sigmoid(b),
    )


def _normalised(x: jax.Array, eps: float) -> jax.Array:
    """[L, H, K] over the last axis."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def _decay(x: jax.Array, rate: jax.Array) -> jax.Array:
    """-exp(rate) * softplus(x)."""
    # Below -20 softplus(x) is exp(x) in float32, which alone may underflow.
    small = jnp.exp(rate + jnp.minimum(x, -20.0))
    return -jnp.where(x < -20.0, small, jnp.exp(rate) * jax.nn.softplus(x))
