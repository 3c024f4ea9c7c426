"""`silu_mul_block_quant` as one Pallas kernel; the formula is the docstring of `polyfuse.spec.silu_mul_block_quant`.

A program takes whole groups of some rows of two arrays [experts, rows, parts, groups, group_size]: the gate is the
first part of one, up the last part of the other. Both are x, of two parts, or they are x and `up`, of one part. What is
neither, interleaved columns and halves with a shorter last group, becomes two arrays by a copy. JAX arrays have no
strides: `scale` is the same [..., G] array for layouts of rows and of columns.
"""

from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from polyfuse.reference._jax.blocks import grouped, stored, valid_rows
from polyfuse.reference._jax.compilation import jit
from polyfuse.reference._jax.quantisation import block_scale, divisor, exponent_byte, quantised, silu_mul, weighted
from polyfuse.reference.pallas import mosaic
from polyfuse.spec import Capability, dtype_name

# Triton casts to float8_e4m3fn from compute capability 8.9 on.
CAPABILITY = Capability(
    devices=("cpu", "cuda"),
    min_arch={"cuda": (8, 9)},
    attrs={
        "quant_dtype": ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "int8"),
        "scale_format": ("float32", "ue8m0", "ue8m0_packed"),
    },
    interpreted=("cpu",),
)

_INT32_MAX = 2**31 - 1
_GPU_TILE = 2048  # elements of q
_GPU_TILE_WIDTH = 512
_CPU_TILE_ROWS = 8192  # the interpreter pays per program and copies the whole result each time


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
    """q [..., D], scale [R, G]. Rows past num_rows are zero in q and have the least scale."""
    del global_scale  # of a format that is not claimed
    return _quantise(
        x,
        up,
        row_weight,
        num_rows,
        expert_ends,
        interleaved=interleaved,
        alpha=alpha,
        up_offset=up_offset,
        limit=limit,
        limit_on=limit_on,
        materialize=materialize,
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


@jit("silu_mul_block_quant")
def _quantise(
    x: jax.Array,
    up: jax.Array | None,
    row_weight: jax.Array | None,
    num_rows: jax.Array | None,
    expert_ends: jax.Array | None,
    *,
    interleaved: bool,
    group_size: int,
    quant_dtype: str,
    scale_format: str,
    scale_layout: str,
    expert_alignment: int,
    fill: float | None,
    **attrs: Any,
) -> tuple[jax.Array, jax.Array]:
    """One kernel, behind copies of what it cannot read where it is, and before what scales of other rows hold."""
    masked = num_rows is not None
    gates, ups, width = _sources(x, up, interleaved, group_size)
    *lead, parts, groups, _ = gates.shape
    valid = valid_rows(tuple(lead), num_rows, expert_ends, expert_alignment)
    exponents = scale_format == "ue8m0_packed"
    if x.size == 0:
        q = jnp.zeros((*lead, width), quant_dtype)
        scale = jnp.zeros((*lead, groups), "uint8" if exponents else "float32")
        return q, stored(scale, valid, masked, scale_format, scale_layout, fill)
    experts = lead[0] if masked else 1
    shape = experts, prod(lead) // experts, parts, groups, group_size
    others = [] if num_rows is None else [num_rows]
    others += [] if row_weight is None else [row_weight.reshape(shape[:2])]
    sources = [gates.reshape(shape), ups.reshape(shape)]
    attrs |= {"masked": masked, "width": width, "quant_dtype": quant_dtype, "scale_format": scale_format}
    native = partial(_in_parts, tile=_gpu_tile(groups, group_size), **attrs)
    interpreted = partial(_in_parts, tile=(min(_CPU_TILE_ROWS, shape[1]), groups, group_size), interpret=True, **attrs)
    if kernels := mosaic.preferred("silu_mul_block_quant"):
        native = kernels.kernel_of(*sources, *others, **attrs) or native
    q, scale = lax.platform_dependent(*sources, *others, cpu=interpreted, cuda=native)
    if quant_dtype == "float8_e4m3fnuz":
        q = lax.bitcast_convert_type(q, quant_dtype)
    q = q.reshape(*lead, groups * group_size)[..., :width]
    return q, stored(scale.reshape(*lead, groups), valid, masked, scale_format, scale_layout, fill)


def _sources(
    x: jax.Array, up: jax.Array | None, interleaved: bool, group_size: int
) -> tuple[jax.Array, jax.Array, int]:
    """The two arrays [..., parts, groups, group_size] of gates and ups, and D."""
    if up is None and (interleaved or x.shape[-1] // 2 % group_size):
        x, up = (x[..., 0::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, axis=-1)
    if up is None:
        both = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2 // group_size, group_size)
        return both, both, x.shape[-1] // 2
    gates, ups = (grouped(columns, group_size)[..., None, :, :] for columns in (x, up))
    return gates, ups, x.shape[-1]


def _gpu_tile(groups: int, size: int) -> tuple[int, int, int]:
    """Rows, groups and elements of a group; powers of two."""
    lanes = pl.next_power_of_2(size)
    tile_groups = min(pl.next_power_of_2(groups), max(1, _GPU_TILE_WIDTH // lanes))
    return max(1, _GPU_TILE // (tile_groups * lanes)), tile_groups, lanes


def _in_parts(gates: jax.Array, ups: jax.Array, *others: jax.Array, tile: tuple[int, int, int], **attrs: Any) -> Any:
    """One launch, or several where q passes 2**31 elements: up to 2**32 bytes the lowering has 32-bit offsets."""
    experts, rows, _, groups, size = gates.shape
    most = max(1, _INT32_MAX // (experts * groups * size * tile[0])) * tile[0]
    parts = [
        _launch(gates, ups, *others, rows=slice(first, min(rows, first + most)), tile=tile, **attrs)
        for first in range(0, rows, most)
    ]
    if len(parts) == 1:
        return parts[0]
    return tuple(jnp.concatenate(outputs, axis=1) for outputs in zip(*parts, strict=True))


def _launch(
    gates: jax.Array,
    ups: jax.Array,
    *others: jax.Array,
    rows: slice,
    tile: tuple[int, int, int],
    masked: bool,
    quant_dtype: str,
    scale_format: str,
    interpret: bool = False,
    **attrs: Any,
) -> Any:
    """q [experts, rows, groups, group_size] and scale [experts, rows, groups]; `rows` starts where a tile does.

    The other arrays are num_rows [experts], if `masked`, and then weights [experts, rows], if there are any.
    """
    experts, _, parts, groups, size = gates.shape
    count = rows.stop - rows.start
    tile_rows, tile_groups, lanes = tile

    skipped = rows.start // tile_rows
    counts = pl.BlockSpec((None,), lambda j, i, e: (e,))
    weights = pl.BlockSpec((None, tile_rows), lambda j, i, e: (e, skipped + i))

    def source(part: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, tile_rows, None, tile_groups, lanes), lambda j, i, e: (e, skipped + i, part, j, 0))

    attrs |= {"masked": masked, "rows": rows, "groups": groups, "size": size, "quant_dtype": quant_dtype}
    q_dtype = "uint8" if quant_dtype == "float8_e4m3fnuz" else quant_dtype
    scale_dtype = "uint8" if scale_format == "ue8m0_packed" else "float32"
    return pl.pallas_call(
        partial(_kernel, power_of_two=scale_format != "float32", **attrs),
        out_shape=(
            jax.ShapeDtypeStruct((experts, count, groups, size), q_dtype),
            jax.ShapeDtypeStruct((experts, count, groups), scale_dtype),
        ),
        grid=(pl.cdiv(groups, tile_groups), pl.cdiv(count, tile_rows), experts),
        in_specs=[source(0), source(parts - 1), *([counts] if masked else []), *([weights] * (len(others) - masked))],
        out_specs=(
            pl.BlockSpec((None, *tile), lambda j, i, e: (e, i, j, 0)),
            pl.BlockSpec((None, tile_rows, tile_groups), lambda j, i, e: (e, i, j)),
        ),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=min(32, pl.cdiv(prod(tile), 512))),
        name="silu_mul_block_quant",
    )(gates, ups, *others)


def _kernel(
    gate_ref: Any,
    up_ref: Any,
    *refs: Any,
    masked: bool,
    rows: slice,
    groups: int,
    size: int,
    width: int,
    quant_dtype: str,
    power_of_two: bool,
    scale_ub: float | None,
    scale_min: float | None,
    reciprocal: bool,
    **activation: Any,
) -> None:
    *other_refs, q_ref, scale_ref = refs
    counts, weights = other_refs[:masked], other_refs[masked:]
    tile_rows, tile_groups, lanes = gate_ref.shape
    row = rows.start + pl.program_id(1) * tile_rows + lax.iota(jnp.int32, tile_rows)
    group = pl.program_id(0) * tile_groups + lax.iota(jnp.int32, tile_groups)
    columns = (group < groups)[:, None] & (lax.iota(jnp.int32, lanes) < size)[None, :]
    inside = (row < rows.stop)[:, None, None] & columns[None]
    live = inside
    for ref in counts:
        live = inside & (row < ref[...])[:, None, None]
    gate, up = (plgpu.load(ref, mask=live, other=0).astype(jnp.float32) for ref in (gate_ref, up_ref))
    dtype = dtype_name(gate_ref.dtype)
    y = silu_mul(gate, up, dtype, **activation)
    for ref in weights:
        weight = plgpu.load(ref, mask=row < rows.stop, other=0)[:, None, None]
        y = weighted(y, weight, dtype, activation["materialize"])
    if weights:  # times an infinite weight the zeros outside of the rows and columns are NaN
        column = group[:, None] * size + lax.iota(jnp.int32, lanes)[None, :]
        y = jnp.where(live & (column < width)[None], y, 0.0)
    scale = block_scale(y, quant_dtype, power_of_two, scale_ub, scale_min, reciprocal)
    ratio = y / divisor(scale, scale_min)[:, :, None]
    q = _fnuz_bytes(ratio) if quant_dtype == "float8_e4m3fnuz" else quantised(ratio, quant_dtype)
    plgpu.store(q_ref, q, mask=inside)
    scale = exponent_byte(scale) if scale_ref.dtype == jnp.uint8 else scale
    plgpu.store(scale_ref, scale, mask=(row < rows.stop)[:, None] & (group < groups)[None, :])


def _fnuz_bytes(ratio: jax.Array) -> jax.Array:
    """The bytes of float8_e4m3fnuz, to which Triton cannot cast: those of float8_e4m3fn for twice the value, except
    that 0x80 is NaN and no zero."""
    code = lax.bitcast_convert_type(quantised(2 * ratio, "float8_e4m3fn"), jnp.uint8)
    return jnp.where(jnp.isnan(ratio), 0x80, jnp.where(code == 0x80, 0, code))
