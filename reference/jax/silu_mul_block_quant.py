"""`silu_mul_block_quant` in jax.numpy; the formula is the docstring of `polyfuse.spec.silu_mul_block_quant`.

JAX arrays have no strides: every `scale_layout` returns the same logical [..., G] array, and XLA lays it out.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from polyfuse.reference._jnp import block_scale, clamp, exponent_byte, silu_mul
from polyfuse.spec import Capability, dtype_name
from polyfuse.spec.silu_mul_block_quant import QMAX

CAPABILITY = Capability()


@partial(
    jax.jit,
    static_argnames=(
        "group_size",
        "quant_dtype",
        "scale_format",
        "scale_layout",
        "scale_ub",
        "limit",
        "materialize",
    ),
)
def silu_mul_block_quant(
    x: jax.Array,
    *,
    num_rows: jax.Array | None = None,
    group_size: int = 128,
    quant_dtype: str = "float8_e4m3fn",
    scale_format: str = "float32",
    scale_layout: str = "row_major",
    scale_ub: float | None = None,
    limit: float | None = None,
    materialize: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """q [..., D] and scale [..., G]; in rows past num_rows q is zero and scale the least one."""
    gate, up = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    y = silu_mul(gate, up, dtype_name(x.dtype), limit, materialize)
    if num_rows is not None:
        y = jnp.where(jnp.arange(x.shape[1])[:, None] < num_rows[:, None, None], y, 0.0)
    groups = y.reshape(*y.shape[:-1], y.shape[-1] // group_size, group_size)
    scale = block_scale(groups, quant_dtype, scale_format != "float32", scale_ub)
    q = _quantised(groups / scale[..., None], quant_dtype).reshape(y.shape)
    return q, _packed(scale) if scale_format == "ue8m0_packed" else scale


def _quantised(ratio: jax.Array, dtype: str) -> jax.Array:
    """A cast past the largest finite value would be NaN."""
    clamped = clamp(ratio, -QMAX[dtype], QMAX[dtype])
    if dtype == "int8":
        return jnp.where(jnp.isnan(ratio), 0.0, jnp.round(clamped)).astype(dtype)
    return clamped.astype(dtype)


def _packed(scale: jax.Array) -> jax.Array:
    """[..., groups] exponent bytes as [..., groups / 4] int32, the first group lowest."""
    codes = exponent_byte(scale)
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % 4)])
    return lax.bitcast_convert_type(codes.reshape(*codes.shape[:-1], codes.shape[-1] // 4, 4), jnp.int32)
