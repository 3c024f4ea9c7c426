"""`segment_attention` in jax.numpy; the formula is the docstring of `polyfuse.spec.segment_attention`.

Every array may be traced, vmapped and differentiated. Blocks of rows meet all rows under a mask, whatever `max_seqlen`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from polyfuse.reference._jax.compilation import jit
from polyfuse.reference._jax.sequences import sequences
from polyfuse.spec import Capability

CAPABILITY = Capability(differentiable=True)

BLOCK_ROWS = 512  # whose scores are held at a time


@jit("segment_attention")
def segment_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cu_seqlens: jax.Array,
    *,
    scale: float | None = None,
    max_seqlen: int | None = None,
) -> jax.Array:
    """out [rows, heads, dim], rounded once."""
    rows, _, dim = q.shape
    if not q.size:
        return jnp.zeros(q.shape, q.dtype)
    factor = dim**-0.5 if scale is None else scale
    segment, _ = sequences(rows, cu_seqlens)
    finite = jnp.isfinite(v)
    values = jnp.where(finite, v, 0).astype(jnp.float32)

    def attend(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        """One row's mix of `values` [heads, dim]."""
        query, own = row
        scores = factor * _product("hd,khd->hk", query, k)
        scores = jnp.where(own == segment, scores, -jnp.inf)
        exponentials = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
        return _product("hk,khd->hd", exponentials, values) / exponentials.sum(-1, keepdims=True)

    mixed = lax.map(attend, (q, segment), batch_size=BLOCK_ROWS)
    # Zero times NaN is NaN: what is not finite stays out of the product, and is added to its own segment.
    others = jax.ops.segment_sum(jnp.where(finite, 0, v).astype(jnp.float32), segment + 1, len(cu_seqlens) + 1)
    return (mixed + others[segment + 1]).astype(q.dtype)


def _product(subscripts: str, one: jax.Array, other: jax.Array) -> jax.Array:
    """fp32 products and sums; HIGHEST keeps float32 operands from being rounded to tf32."""
    precision = lax.Precision.HIGHEST
    return jnp.einsum(subscripts, one, other, precision=precision, preferred_element_type=jnp.float32)
