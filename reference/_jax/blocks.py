"""What quantising ops do around their arithmetic in jax.numpy, for both JAX layers: groups, valid rows, stored scales.

JAX arrays have no strides: scales of rows and of columns are the same [..., G] array.
"""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from polyfuse.reference._jax.quantisation import block_scale, divisor, e4m3_scale, exponent_byte, quantised


def quantise(
    y: jax.Array,
    *,
    num_rows: jax.Array | None,
    expert_ends: jax.Array | None,
    global_scale: jax.Array | None,
    group_size: int,
    quant_dtype: str,
    scale_format: str,
    scale_layout: str,
    scale_ub: float | None,
    scale_min: float | None,
    reciprocal: bool,
    expert_alignment: int,
    fill: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Return q and scale of float32 `y` [..., D]. Rows that are not valid are zero in q and have the least scale."""
    *lead, width = y.shape
    valid = valid_rows(tuple(lead), num_rows, expert_ends, expert_alignment)
    if valid is not None:
        y = jnp.where(valid[..., None], y, 0.0)
    groups = grouped(y, group_size)
    if scale_format == "e4m3":
        factor = jnp.float32(1) if global_scale is None else global_scale
        scale = e4m3_scale(groups, quant_dtype, factor)
        wide = scale[..., None]
        ratio = jnp.where(wide == 0, 0.0, groups / (wide * factor))
        scale = scale.astype("float8_e4m3fn")
    else:
        scale = block_scale(groups, quant_dtype, scale_format != "float32", scale_ub, scale_min, reciprocal)
        ratio = groups / divisor(scale, scale_min)[..., None]
    q = quantised(ratio.reshape(*lead, prod(groups.shape[-2:]))[..., :width], quant_dtype)
    return q, stored(scale, valid, num_rows is not None, scale_format, scale_layout, fill)


def grouped(y: jax.Array, group_size: int) -> jax.Array:
    """Return [..., D] as [..., G, group_size], with zeros behind the last column."""
    rest = -y.shape[-1] % group_size
    if rest:
        y = jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, rest)])
    return y.reshape(*y.shape[:-1], y.shape[-1] // group_size, group_size)


def valid_rows(
    lead: tuple[int, ...], num_rows: jax.Array | None, expert_ends: jax.Array | None, alignment: int
) -> jax.Array | None:
    """Return whether each row counts [*lead], or None if all do."""
    if num_rows is not None:
        return jnp.arange(lead[1]) < num_rows[:, None]
    if expert_ends is None:
        return None
    row = jnp.arange(lead[0])
    if not len(expert_ends):
        return row < 0
    begins = (jnp.concatenate([jnp.zeros(1, jnp.int32), expert_ends[:-1]]) + alignment - 1) // alignment * alignment
    owner = jnp.searchsorted(expert_ends, row, side="right", method="scan_unrolled")  # the first that ends behind it
    return (owner < len(expert_ends)) & (row >= begins[jnp.minimum(owner, len(expert_ends) - 1)])


def stored(
    scale: jax.Array, valid: jax.Array | None, masked: bool, scale_format: str, layout: str, fill: float | None
) -> jax.Array:
    """Return the array of the scales [*lead, groups]; of ue8m0 formats they may be exponent bytes already."""
    swizzled, packed = layout == "swizzled_128x4", scale_format == "ue8m0_packed"
    if scale.dtype != jnp.uint8 and (packed or (swizzled and scale_format == "ue8m0")):
        scale = exponent_byte(scale)
    padding = np.zeros((), scale.dtype)
    if fill is not None:
        exponents = scale.dtype == jnp.uint8
        padding = np.asarray(np.log2(fill) + 127 if exponents else fill, np.float32).astype(scale.dtype)
    if valid is not None and (fill is not None or swizzled):
        scale = jnp.where(valid[..., None], scale, padding)
    if swizzled:
        *lead, groups = scale.shape
        experts, rows = (lead[0], prod(lead[1:])) if masked else (1, prod(lead))
        whole = _swizzled(scale.reshape(experts, rows, groups), padding)
        return whole if masked else whole[0]
    if not packed:
        return scale
    pad = [(0, 0)] * (scale.ndim - 1) + [(0, -scale.shape[-1] % 4)]
    codes = jnp.pad(scale, pad, constant_values=padding)
    return lax.bitcast_convert_type(codes.reshape(*codes.shape[:-1], codes.shape[-1] // 4, 4), jnp.int32)


def _swizzled(scale: jax.Array, padding: np.ndarray) -> jax.Array:
    """Return scales [experts, rows, groups] in blocks of 128 rows and 4 groups, in the order of memory."""
    pad = [(0, 0), (0, -scale.shape[1] % 128), (0, -scale.shape[2] % 4)]
    scale = jnp.pad(scale, pad, constant_values=padding)
    experts, rows, groups = scale.shape
    tiles = scale.reshape(experts, rows // 128, 4, 32, groups // 4, 4)
    return tiles.transpose(0, 1, 4, 3, 2, 5).reshape(experts, rows, groups)
