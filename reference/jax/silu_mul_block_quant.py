"""`silu_mul_block_quant` in jax.numpy; the formula is the docstring of `polyfuse.spec.silu_mul_block_quant`.

JAX arrays have no strides: `scale` is the same [..., G] array for every `scale_layout`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from polyfuse.reference._jax.compilation import jit
from polyfuse.reference._jax.quantisation import block_scale, divisor, exponent_byte, quantised, silu_mul
from polyfuse.spec import Capability, dtype_name

CAPABILITY = Capability()


def silu_mul_block_quant(
    x: jax.Array,
    *,
    up: jax.Array | None = None,
    num_rows: jax.Array | None = None,
    group_size: int = 128,
    quant_dtype: str = "float8_e4m3fn",
    scale_format: str = "float32",
    scale_layout: str = "row_major",
    scale_ub: float | None = None,
    scale_min: float | None = None,
    limit: float | None = None,
    materialize: bool = False,
    reciprocal: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """q [..., D], scale [..., G]. Rows past num_rows are zero in q and have the least scale."""
    return _quantise(
        x,
        up,
        num_rows,
        group_size=group_size,
        quant_dtype=quant_dtype,
        scale_format=scale_format,
        scale_ub=scale_ub,
        scale_min=scale_min,
        limit=limit,
        materialize=materialize,
        reciprocal=reciprocal,
    )


@jit("silu_mul_block_quant")
def _quantise(
    x: jax.Array,
    up: jax.Array | None,
    num_rows: jax.Array | None,
    *,
    group_size: int,
    quant_dtype: str,
    scale_format: str,
    scale_ub: float | None,
    scale_min: float | None,
    reciprocal: bool,
    **activation: Any,
) -> tuple[jax.Array, jax.Array]:
    gate, factor = jnp.split(x, 2, axis=-1) if up is None else (x, up)
    y = silu_mul(gate.astype(jnp.float32), factor.astype(jnp.float32), dtype_name(x.dtype), **activation)
    if num_rows is not None:
        y = jnp.where(jnp.arange(y.shape[1])[:, None] < num_rows[:, None, None], y, 0.0)
    groups = y.reshape(*y.shape[:-1], y.shape[-1] // group_size, group_size)
    scale = block_scale(groups, quant_dtype, scale_format != "float32", scale_ub, scale_min, reciprocal)
    q = quantised(groups / divisor(scale, scale_min)[..., None], quant_dtype).reshape(y.shape)
    return q, _packed(scale) if scale_format == "ue8m0_packed" else scale


def _packed(scale: jax.Array) -> jax.Array:
    """Exponent bytes [..., groups] as int32 [..., groups / 4], the first group lowest."""
    codes = exponent_byte(scale)
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % 4)])
    return lax.bitcast_convert_type(codes.reshape(*codes.shape[:-1], codes.shape[-1] // 4, 4), jnp.int32)
