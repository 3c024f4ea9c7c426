"""The Triton backend of `silu_mul_block_quant`: one launch, each element read once.

The (row, group) pairs of an expert, or of all rows, are numbered through; a program takes BLOCK consecutive ones as a
tile [BLOCK, group_size]. A group never spans programs, so that no tile shape changes a bit.
"""

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from polyfuse.spec import Unsupported
from polyfuse.triton_impl import _blocks
from polyfuse.triton_impl._blocks import ANY_VALUE
from polyfuse.triton_impl._common import capability, next_power_of_2, round_to, widen
from polyfuse.triton_impl._experts import each_tile, share_out
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl._plans import Change, Plan, Plans, Step, Taken, contiguous, rows_together
from polyfuse.triton_impl._quantise import store_groups
from polyfuse.triton_impl._silu_mul import activated

NAME = "silu_mul_block_quant"

CAPABILITY = capability()


@triton.jit
def _tile(
    tile, expert, first, valid, x_ptr, up_ptr, weight_ptr, global_scale_ptr, q_ptr, scale_ptr, scale_ub, limit, alpha,
    up_offset, rows, scale_expert, scale_row, scale_group, x_expert, x_row, x_column, up_expert, up_row, up_column,
    weight_expert, weight_row, D: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr, QMAX: tl.constexpr,
    FLOOR: tl.constexpr, FORMAT: tl.constexpr, SWIZZLED: tl.constexpr, PADDING: tl.constexpr, RECIPROCAL: tl.constexpr,
    INTERLEAVED: tl.constexpr, LIMIT_ON: tl.constexpr, MATERIALIZE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of an expert: a row is its row `first` or later."""
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    COLUMNS: tl.constexpr = next_power_of_2(GROUP)
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.uint32
    pair = tile.to(INDEX) * BLOCK + tl.arange(0, BLOCK).to(INDEX)  # [BLOCK]
    row = pair // GROUPS
    group = pair - row * GROUPS
    live = row < valid.to(INDEX)
    row = tl.minimum(row, valid.to(INDEX) - 1)  # past the last row it is read again: cheaper than a mask
    lane = tl.arange(0, COLUMNS)[None, :]
    column = (group * GROUP).to(tl.int64)[:, None] + lane  # [BLOCK, COLUMNS]
    source = x_ptr + (expert * x_expert + first * x_row) + row.to(tl.int64)[:, None] * x_row
    inside = lane < GROUP
    if D % GROUP != 0:
        inside = inside & (column < D)
    if INTERLEAVED:
        place = tl.arange(0, 2 * COLUMNS)[None, :]
        both = (group * (2 * GROUP)).to(tl.int64)[:, None] + place
        held = place < 2 * GROUP
        if D % GROUP != 0:
            held = held & (both < 2 * D)
        columns = tl.load(source + both * x_column, mask=held, other=0.0, eviction_policy="evict_first")
        gate, up = tl.split(tl.reshape(columns, [BLOCK, COLUMNS, 2]))
    else:
        gate = tl.load(source + column * x_column, mask=inside, other=0.0, eviction_policy="evict_first")
        if up_ptr is None:
            ups = source + (column + D) * x_column
        else:
            ups = up_ptr + (expert * up_expert + first * up_row)
            ups += row.to(tl.int64)[:, None] * up_row + column * up_column
        up = tl.load(ups, mask=inside, other=0.0, eviction_policy="evict_first")
    dtype: tl.constexpr = gate.dtype
    y = activated(widen(gate), widen(up), alpha, up_offset, limit, dtype, LIMIT_ON, MATERIALIZE)
    if weight_ptr is not None:
        weights = weight_ptr + (expert * weight_expert + first * weight_row)
        y = y * widen(tl.load(weights + row.to(tl.int64) * weight_row))[:, None]
        if MATERIALIZE:
            y = widen(round_to(y, dtype))
        if GROUP != COLUMNS or D % GROUP != 0:
            y = tl.where(inside, y, 0.0)  # 0 times an infinite weight
    STORED: tl.constexpr = D // 2 if DTYPE == "float4_e2m1" else D
    store_groups(
        y,
        pair.to(tl.int64) + first * GROUPS,
        row.to(tl.int64) + first,
        group,
        live,
        q_ptr + expert * rows * STORED,
        scale_ptr + expert * scale_expert,
        global_scale_ptr,
        scale_ub,
        scale_row,
        scale_group,
        D,
        GROUP,
        DTYPE,
        QMAX,
        FLOOR,
        FORMAT,
        SWIZZLED,
        PADDING,
        RECIPROCAL,
    )


@triton.jit(do_not_specialize=ANY_VALUE)
def _kernel(
    x_ptr,  # [experts, rows, 2*D], or the gate [experts, rows, D]
    up_ptr,  # [experts, rows, D], or None for the columns of x from D on
    weight_ptr,  # [experts, rows], or None
    num_rows_ptr,  # [experts], or None
    ends_ptr,  # [experts], or None; with neither, all rows are valid
    global_scale_ptr,  # or None
    q_ptr,  # [experts, rows, D], a byte for two columns of four bits
    scale_ptr,  # [experts, rows, GROUPS]; packed: bytes of int32 [experts, rows, GROUPS / 4]
    scale_ub,
    limit,
    alpha,
    up_offset,
    rows,
    experts,
    scale_expert,
    scale_row,
    scale_group,
    x_expert,
    x_row,
    x_column,
    up_expert,
    up_row,
    up_column,
    weight_expert,
    weight_row,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    QMAX: tl.constexpr,
    FLOOR: tl.constexpr,
    FORMAT: tl.constexpr,
    SWIZZLED: tl.constexpr,
    PADDING: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMIT_ON: tl.constexpr,
    MATERIALIZE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    each_tile(
        _tile,
        (
            x_ptr, up_ptr, weight_ptr, global_scale_ptr, q_ptr, scale_ptr, scale_ub, limit, alpha, up_offset, rows,
            scale_expert, scale_row, scale_group, x_expert, x_row, x_column, up_expert, up_row, up_column,
            weight_expert, weight_row, D, GROUP, DTYPE, QMAX, FLOOR, FORMAT, SWIZZLED, PADDING, RECIPROCAL,
            INTERLEAVED, LIMIT_ON, MATERIALIZE, WIDE, BLOCK,
        ),
        num_rows_ptr, ends_ptr, rows, experts, ALIGNMENT, CHUNK, GROUPS, BLOCK,
    )  # fmt: skip


_launch = Launcher(NAME, _kernel)


def _one_row(row_weight: torch.Tensor) -> torch.Tensor:
    return row_weight.flatten()


def _plan(
    inputs: tuple[Any, ...],
    interleaved: bool,
    alpha: float,
    up_offset: float,
    limit: float | None,
    limit_on: str,
    materialize: bool,
    group: int,
    quant_dtype: str,
    scale_format: str,
    scale_layout: str,
    scale_ub: float | None,
    scale_min: float | None,
    reciprocal: bool,
    alignment: int,
    fill: float | None,
) -> Plan:
    """How a call with these inputs, in the order of the kernel's parameters, is launched.

    Kept are the forms of the results.
    """
    if group > _blocks.WIDEST_GROUP:
        raise Unsupported(f"{NAME}: group_size={group}: a program takes whole groups of up to {_blocks.WIDEST_GROUP}")
    x, up, _, num_rows, ends, _ = inputs
    lead, width = tuple(x.shape[:-1]), x.shape[-1] // 2 if up is None else x.shape[-1]
    masked, count = num_rows is not None, None if ends is None else len(ends)
    results = _blocks.results(
        lead, width, x.device, masked, ends is not None, group, quant_dtype, scale_format, scale_layout, scale_min,
        reciprocal, fill,
    )  # fmt: skip
    changes: dict[int, Change] = {3: contiguous, 4: contiguous}
    if not masked:
        changes |= {0: rows_together, 1: rows_together, 2: _one_row}
    taken = Taken(inputs, changes)
    if not prod(lead) * width or count == 0:
        return Plan(taken, kept=results)
    experts, rows = (lead[0], lead[1]) if masked else (1, prod(lead))
    groups = -(-width // group)
    block, warps = _blocks.tile(group, 2 * x.itemsize, experts * rows * width, masked or count is not None)
    shares = share_out(x.device, experts, rows, masked, count, groups, block)
    strides = [
        (None,) * names if tensor is None else tensor.stride() if masked else (0, *tensor.stride())
        for tensor, names in zip(taken.ready, (3, 3, 2), strict=False)
    ]
    wide = rows * groups >= _blocks.WIDE_PAIRS
    how = interleaved, limit_on, materialize, wide, block, alignment, shares.chunk
    fixed = (*strides[0], *strides[1], *strides[2], *results.fixed, *how)
    floats = scale_ub, limit, None if alpha == 1 else alpha, None if up_offset == 0 else up_offset
    numbers = *floats, rows, shares.experts, *results.numbers
    return Plan(taken, Step(_launch, (shares.programs, 1, 1), taken, numbers, fixed, warps), kept=results)


_plans = Plans(_plan)


def silu_mul_block_quant(
    x: torch.Tensor,
    *,
    up: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
    expert_ends: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns q and scale, each rounded once."""
    inputs = x, up, row_weight, num_rows, expert_ends, global_scale
    plan, addresses = _plans(
        *(inputs, interleaved, alpha, up_offset, limit, limit_on, materialize, group_size, quant_dtype, scale_format),
        *(scale_layout, scale_ub, scale_min, reciprocal, expert_alignment, fill),
    )
    q, scale = plan.kept.allocate(x.device)
    plan(inputs, addresses, plan.kept.writable(q, scale))
    return q, scale
