"""`gdn_post_conv` in jax.numpy; the formula is the docstring of `polyfuse.spec.gdn_post_conv`.

Every array may be traced, vmapped, sharded over its rows, and differentiated.
"""

import jax
import jax.numpy as jnp
from jax import lax

from polyfuse.reference._jax.compilation import jit
from polyfuse.spec import FP32_TINY, Capability

CAPABILITY = Capability(differentiable=True)


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
    length, heads_v = len(conv_out), len(A_log)
    width = num_k_heads * head_k_dim
    q, k, v = jnp.split(conv_out, (width, 2 * width), axis=1)
    q, k = (part.reshape(length, num_k_heads, head_k_dim) for part in (q, k))
    v = v.reshape(length, heads_v, head_v_dim)
    if l2norm:
        q, k = (normalised(part.astype(jnp.float32), l2norm_eps).astype(conv_out.dtype) for part in (q, k))
    return q, k, v, *gates(a, b, A_log, dt_bias, output_g_exp)


def normalised(x: jax.Array, eps: float) -> jax.Array:
    """float32, over the last axis."""
    total = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(total + max(eps, FP32_TINY))


def gates(
    a: jax.Array, b: jax.Array, A_log: jax.Array, dt_bias: jax.Array, output_g_exp: bool
) -> tuple[jax.Array, jax.Array]:
    """g and beta [L, HV]."""
    a, b = (part.reshape(len(part), len(A_log)) for part in (a, b))
    a, b, A_log, dt_bias = (part.astype(jnp.float32) for part in (a, b, A_log, dt_bias))
    g = -_decay_rate(a + dt_bias, A_log)
    return jnp.exp(g) if output_g_exp else g, jax.nn.sigmoid(b)


def _decay_rate(x: jax.Array, log_rate: jax.Array) -> jax.Array:
    """exp(log_rate) * softplus(x)."""
    # Below -20 softplus(x) is exp(x), which may underflow where the product does not.
    tail = jnp.exp(jnp.minimum(x, -20.0) + log_rate)
    return jnp.where(x < -20.0, tail, jnp.exp(log_rate) * jax.nn.softplus(x))
