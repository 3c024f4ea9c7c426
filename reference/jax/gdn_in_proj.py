"""`gdn_in_proj` in jax.numpy; the formula is the docstring of `polyfuse.spec.gdn_in_proj`.

XLA schedules the products itself: of the strategies only `merged` asks for something else, one product over all
weights as one matrix, which the compiled function joins.
"""

import jax
import jax.numpy as jnp
from jax import lax

from polyfuse.reference._jax.compilation import jit
from polyfuse.spec import Capability

CAPABILITY = Capability(attrs={"strategy": ("auto", "sequential", "parallel", "merged")}, differentiable=True)


@jit("gdn_in_proj")
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
    for_qkvz = [w for w in (w_qkvz, w_z) if w is not None]
    for_ba = [w for w in (w_ba, w_a) if w is not None]
    if strategy == "merged":
        large, small = jnp.split(_product(x, jnp.concatenate(for_qkvz + for_ba)), [sum(map(len, for_qkvz))], axis=-1)
    else:
        large, small = (
            jnp.concatenate([_product(x, weight) for weight in weights], axis=-1) for weights in (for_qkvz, for_ba)
        )
    return _finish(large, bias_qkvz, x.dtype), _finish(small, bias_ba, x.dtype)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """fp32 products and sums; HIGHEST keeps float32 operands from being rounded to tf32."""
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(
        x, weight, contract_last, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _finish(total: jax.Array, bias: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    return (total if bias is None else total + bias.astype(jnp.float32)).astype(dtype)
