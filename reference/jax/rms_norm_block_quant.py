"""`rms_norm_block_quant` in jax.numpy; the formula is the docstring of `polyfuse.spec.rms_norm_block_quant`.

JAX arrays have no strides: `scale` is the same [..., G] array for layouts of rows and of columns.
"""

import jax
import jax.numpy as jnp
from jax import lax

from polyfuse.reference._jax.blocks import quantise
from polyfuse.reference._jax.compilation import jit
from polyfuse.reference._jax.rounding import round_to
from polyfuse.spec import FP32_TINY, Capability, dtype_name

CAPABILITY = Capability()


@jit("rms_norm_block_quant")
def rms_norm_block_quant(
    x: jax.Array,
    weight: jax.Array,
    *,
    residual: jax.Array | None = None,
    num_rows: jax.Array | None = None,
    expert_ends: jax.Array | None = None,
    global_scale: jax.Array | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    group_size: int = 128,
    quant_dtype: str = "float8_e4m3fn",
    scale_format: str = "float32",
    scale_layout: str = "row_major",
    scale_ub: float | None = None,
    scale_min: float | None = None,
    reciprocal: bool = False,
    expert_alignment: int = 1,
    fill: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [..., Q], scale [R, G] and the sum. Rows that are not valid are zero in q and have the least scale."""
    h = x.astype(jnp.float32)
    if residual is not None:
        h = round_to(h + residual.astype(jnp.float32), dtype_name(x.dtype))
    mean = jnp.sum(h * h, axis=-1, keepdims=True) / max(x.shape[-1], 1)
    y = h * lax.rsqrt(mean + max(eps, FP32_TINY)) * (weight.astype(jnp.float32) + weight_offset)
    q, scale = quantise(
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
    return q, scale, jnp.zeros((0, x.shape[-1]), x.dtype) if residual is None else h.astype(x.dtype)
