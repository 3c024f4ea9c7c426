"""The Triton backend of `block_quant`: one launch, each element read once, in the tiles of `silu_mul_block_quant`."""

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from polyfuse.spec import Unsupported
from polyfuse.triton_impl import _blocks
from polyfuse.triton_impl._blocks import ANY_VALUE
from polyfuse.triton_impl._common import capability, next_power_of_2, widen
from polyfuse.triton_impl._experts import each_tile, share_out
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl._plans import Change, Plan, Plans, Step, Taken, contiguous, rows_together
from polyfuse.triton_impl._quantise import store_groups

NAME = "block_quant"

CAPABILITY = capability()


@triton.jit
def _tile(
    tile, expert, first, valid, x_ptr, global_scale_ptr, q_ptr, scale_ptr, scale_ub, rows, scale_expert, scale_row,
    scale_group, x_expert, x_row, x_column, D: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    QMAX: tl.constexpr, FLOOR: tl.constexpr, FORMAT: tl.constexpr, SWIZZLED: tl.constexpr, PADDING: tl.constexpr,
    RECIPROCAL: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
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
    inside = lane < GROUP
    if D % GROUP != 0:
        inside = inside & (column < D)
    source = x_ptr + (expert * x_expert + first * x_row) + row.to(tl.int64)[:, None] * x_row + column * x_column
    y = widen(tl.load(source, mask=inside, other=0.0, eviction_policy="evict_first"))
    STORED: tl.constexpr = D // 2 if DTYPE == "float4_e2m1" else D
    store_groups(
        y, pair.to(tl.int64) + first * GROUPS, row.to(tl.int64) + first, group, live, q_ptr + expert * rows * STORED,
        scale_ptr + expert * scale_expert, global_scale_ptr, scale_ub, scale_row, scale_group, D, GROUP,
        DTYPE, QMAX, FLOOR, FORMAT, SWIZZLED, PADDING, RECIPROCAL,
    )  # fmt: skip


@triton.jit(do_not_specialize=ANY_VALUE)
def _kernel(
    x_ptr,  # [experts, rows, D]
    num_rows_ptr,  # [experts], or None
    ends_ptr,  # [experts], or None; with neither, all rows are valid
    global_scale_ptr,  # or None
    q_ptr,  # [experts, rows, D], a byte for two columns of four bits
    scale_ptr,  # [experts, rows, GROUPS]; packed: bytes of int32 [experts, rows, GROUPS / 4]
    scale_ub,
    rows,
    experts,
    scale_expert,
    scale_row,
    scale_group,
    x_expert,
    x_row,
    x_column,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    QMAX: tl.constexpr,
    FLOOR: tl.constexpr,
    FORMAT: tl.constexpr,
    SWIZZLED: tl.constexpr,
    PADDING: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    each_tile(
        _tile,
        (
            x_ptr, global_scale_ptr, q_ptr, scale_ptr, scale_ub, rows, scale_expert, scale_row, scale_group, x_expert,
            x_row, x_column, D, GROUP, DTYPE, QMAX, FLOOR, FORMAT, SWIZZLED, PADDING, RECIPROCAL, WIDE, BLOCK,
        ),
        num_rows_ptr, ends_ptr, rows, experts, ALIGNMENT, CHUNK, GROUPS, BLOCK,
    )  # fmt: skip


_launch = Launcher(NAME, _kernel)


def _plan(
    inputs: tuple[Any, ...],
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
    x, num_rows, ends, _ = inputs
    (*lead, width), masked, count = x.shape, num_rows is not None, None if ends is None else len(ends)
    results = _blocks.results(
        tuple(lead), width, x.device, masked, ends is not None, group, quant_dtype, scale_format, scale_layout,
        scale_min, reciprocal, fill,
    )  # fmt: skip
    changes: dict[int, Change] = {1: contiguous, 2: contiguous}
    if not masked:
        changes[0] = rows_together
    taken = Taken(inputs, changes)
    if not prod(x.shape) or count == 0:
        return Plan(taken, kept=results)
    if group > _blocks.WIDEST_GROUP:
        raise Unsupported(f"{NAME}: group_size={group}: a program takes whole groups of up to {_blocks.WIDEST_GROUP}")
    experts, rows = lead if masked else (1, prod(lead))
    groups = -(-width // group)
    block, warps = _blocks.tile(group, x.itemsize, experts * rows * width, masked or count is not None)
    shares = share_out(x.device, experts, rows, masked, count, groups, block)
    strides = taken.ready[0].stride() if masked else (0, *taken.ready[0].stride())
    wide = rows * groups >= _blocks.WIDE_PAIRS
    fixed = (*strides, *results.fixed, wide, block, alignment, shares.chunk)
    numbers = scale_ub, rows, shares.experts, *results.numbers
    return Plan(taken, Step(_launch, (shares.programs, 1, 1), taken, numbers, fixed, warps), kept=results)


_plans = Plans(_plan)


def block_quant(
    x: torch.Tensor,
    *,
    num_rows: torch.Tensor | None = None,
    expert_ends: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
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
    inputs = x, num_rows, expert_ends, global_scale
    plan, addresses = _plans(
        *(inputs, group_size, quant_dtype, scale_format, scale_layout, scale_ub, scale_min, reciprocal),
        *(expert_alignment, fill),
    )
    q, scale = plan.kept.allocate(x.device)
    plan(inputs, addresses, plan.kept.writable(q, scale))
    return q, scale
