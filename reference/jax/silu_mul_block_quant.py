"""`silu_mul_block_quant` in jax.numpy; the formula is the docstring of `polyfuse.spec.silu_mul_block_quant`.

JAX arrays have no strides: `scale` is the same [..., G] array for layouts of rows and of columns.
"""

import jax
import jax.numpy as jnp

from polyfuse.reference._jax.blocks import quantise
from polyfuse.reference._jax.compilation import jit
from polyfuse.reference._jax.quantisation import silu_mul, weighted
from polyfuse.spec import Capability, dtype_name

CAPABILITY = Capability()


@jit("silu_mul_block_quant")
def silu_mul_block_quant(
    x: jax.Array,
    *,
    up: jax.Array | None = None,
    row_weight: jax.Array | None = None,
    num_rows: jax.Array | None = None,
    expert_ends: jax.Array | None = None,
    global_scale: jax.Array | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    limit_on: str = "input",
    materialize: bool = False,
    group_size: int = 128,
    quant_dtype: str = "float8_e4m3fn",
    scale_format: str = "float32",
    scale_layout: str = "row_major",
    scale_ub: float | None = None,
    scale_min: float | None = None,
    reciprocal: bool = False,
    expert_alignment: int = 1,
    fill: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """q [..., Q], scale [R, G]. Rows that are not valid are zero in q and have the least scale."""
    if interleaved:
        gate, factor = x[..., 0::2], x[..., 1::2]
    else:
        gate, factor = jnp.split(x, 2, axis=-1) if up is None else (x, up)
    dtype = dtype_name(x.dtype)
    y = silu_mul(
        gate.astype(jnp.float32),
        factor.astype(jnp.float32),
        dtype,
        alpha=alpha,
        up_offset=up_offset,
        limit=limit,
        limit_on=limit_on,
        materialize=materialize,
    )
    y = weighted(y, None if row_weight is None else row_weight[..., None], dtype, materialize)
    return quantise(
        y,
        num_rows=num_rows,
        expert_ends=expert_ends,
        global_scale=global_scale,
        group_size=group_size,
        quant_dtype=quant_dtype,
        scale_format=scale_format,
        scale_layout=scale_layout,
        scale_ub=scale_ub,
        scale_min=scale_min,
        reciprocal=reciprocal,
        expert_alignment=expert_alignment,
        fill=fill,
    )
