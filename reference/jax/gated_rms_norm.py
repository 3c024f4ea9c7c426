"""`gated_rms_norm` in jax.numpy; the formula is the docstring of `polyfuse.spec.gated_rms_norm`.

Every array may be traced, vmapped, sharded over its rows, and differentiated.
"""

import jax
import jax.numpy as jnp
from jax import lax

from polyfuse.reference._jax.compilation import jit
from polyfuse.spec import FP32_TINY, Capability

CAPABILITY = Capability(differentiable=True)


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
    rows, wide = x.astype(jnp.float32), gate.astype(jnp.float32)
    mean = jnp.sum(rows * rows, axis=-1, keepdims=True) / max(x.shape[-1], 1)
    normalised = rows * lax.rsqrt(mean + max(eps, FP32_TINY))
    act = jax.nn.silu(wide) if activation == "silu" else jax.nn.sigmoid(wide)
    return (normalised * (weight.astype(jnp.float32) + weight_offset) * act).astype(x.dtype)
