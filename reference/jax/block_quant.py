"""`block_quant` in jax.numpy; the formula is the docstring of `polyfuse.spec.block_quant`.

JAX arrays have no strides: `scale` is the same [..., G] array for layouts of rows and of columns.
"""

import jax
import jax.numpy as jnp

from polyfuse.reference._jax.blocks import quantise
from polyfuse.reference._jax.compilation import jit
from polyfuse.spec import Capability

CAPABILITY = Capability()


@jit("block_quant")
def block_quant(
    x: jax.Array,
    *,
    num_rows: jax.Array | None = None,
    expert_ends: jax.Array | None = None,
    global_scale: jax.Array | None = None,
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
    return quantise(
        x.astype(jnp.float32),
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
