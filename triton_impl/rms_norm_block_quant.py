"""The Triton backend of `rms_norm_block_quant`: one launch, each element of x read once.

A program takes ROWS whole rows as a tile [ROWS * groups, group_size], padded to powers of two: summed over a row it
gives the norm, and its lines are the groups. The sum is a tree over neighbours, so that no tile shape changes a bit.
"""

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from polyfuse._torch.memory import new
from polyfuse.spec import FP32_TINY
from polyfuse.triton_impl import _blocks
from polyfuse.triton_impl._blocks import ANY_VALUE
from polyfuse.triton_impl._common import capability, next_power_of_2, round_to, widen
from polyfuse.triton_impl._experts import each_tile, share_out
from polyfuse.triton_impl._gdn import sum_of_squares
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl._plans import Change, Plan, Plans, Step, Taken, contiguous, rows_together
from polyfuse.triton_impl._quantise import store_groups

NAME = "rms_norm_block_quant"

WIDEST_ROW = 2**15  # padded columns of a program
CAPABILITY = capability(ranges={"D": (0, WIDEST_ROW // 2)})

# (up to this many elements of x, elements per program): few rows need many programs.
TILES = ((2**18, 1024), (2**63, 2048))
WARP_ELEMENTS = 2048  # 64 of a thread, if that gives enough warps
ROWS_WITH_EXPERTS = 4  # at most, of which an expert may have fewer


@triton.jit
def _tile(
    tile, expert, first, valid, x_ptr, residual_ptr, weight_ptr, global_scale_ptr, q_ptr, scale_ptr, sum_ptr, eps,
    offset, scale_ub, rows, scale_expert, scale_row, scale_group, x_expert, x_row, x_column, residual_expert,
    residual_row, residual_column, D: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr, QMAX: tl.constexpr,
    FLOOR: tl.constexpr, FORMAT: tl.constexpr, SWIZZLED: tl.constexpr, PADDING: tl.constexpr,
    RECIPROCAL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of an expert: a row is its row `first` or later."""
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    LINES: tl.constexpr = next_power_of_2(GROUPS)
    LANES: tl.constexpr = next_power_of_2(GROUP)
    line = tl.arange(0, ROWS * LINES)
    row = tile.to(tl.int64) * ROWS + line // LINES  # [ROWS * LINES]
    group = line % LINES
    live = (row < valid) & (group < GROUPS)
    source = first + tl.minimum(row, valid.to(tl.int64) - 1)[:, None]  # past the last row it is read again
    lane = tl.arange(0, LANES)[None, :]
    column = (group * GROUP)[:, None] + lane
    inside = (lane < GROUP) & (column < D)
    places = x_ptr + expert * x_expert + source * x_row + column * x_column
    x = tl.load(places, mask=inside, other=0.0, eviction_policy="evict_first")
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    dtype: tl.constexpr = x.dtype
    h = widen(x)
    if residual_ptr is not None:
        places = residual_ptr + expert * residual_expert + source * residual_row + column * residual_column
        h = h + widen(tl.load(places, mask=inside, other=0.0, eviction_policy="evict_first"))
        rounded = round_to(h, dtype)
        own = sum_ptr + (expert * rows + first) * D
        tl.store(own + (row * D)[:, None] + column, rounded, mask=live[:, None] & inside)
        h = widen(rounded)
    total = sum_of_squares(tl.reshape(h, [ROWS, 1, LINES * LANES]))  # [ROWS, 1]
    inverse = tl.rsqrt(tl.fma(total, 1.0 / D, eps))
    inverse = tl.reshape(tl.broadcast_to(inverse, [ROWS, LINES]), [ROWS * LINES])[:, None]
    y = tl.where(inside, h * inverse * (widen(weight) + offset), 0.0)
    row += first
    STORED: tl.constexpr = D // 2 if DTYPE == "float4_e2m1" else D
    store_groups(
        y, row * GROUPS + group, row, group, live, q_ptr + expert * rows * STORED, scale_ptr + expert * scale_expert,
        global_scale_ptr, scale_ub, scale_row, scale_group, D, GROUP,
        DTYPE, QMAX, FLOOR, FORMAT, SWIZZLED, PADDING, RECIPROCAL,
    )  # fmt: skip


@triton.jit(do_not_specialize=ANY_VALUE)
def _kernel(
    x_ptr,  # [experts, rows, D]
    residual_ptr,  # the same, or None
    weight_ptr,  # [D]
    num_rows_ptr,  # [experts], or None
    ends_ptr,  # [experts], or None; with neither, all rows are valid
    global_scale_ptr,  # or None
    q_ptr,  # [experts, rows, D], a byte for two columns of four bits
    scale_ptr,  # [experts, rows, GROUPS]; packed: bytes of int32 [experts, rows, GROUPS / 4]
    sum_ptr,  # [experts, rows, D] with residual
    eps,
    offset,
    scale_ub,
    rows,
    experts,
    scale_expert,
    scale_row,
    scale_group,
    x_expert,
    x_row,
    x_column,
    residual_expert,
    residual_row,
    residual_column,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    QMAX: tl.constexpr,
    FLOOR: tl.constexpr,
    FORMAT: tl.constexpr,
    SWIZZLED: tl.constexpr,
    PADDING: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    each_tile(
        _tile,
        (
            x_ptr, residual_ptr, weight_ptr, global_scale_ptr, q_ptr, scale_ptr, sum_ptr, eps, offset, scale_ub, rows,
            scale_expert, scale_row, scale_group, x_expert, x_row, x_column, residual_expert, residual_row,
            residual_column, D, GROUP, DTYPE, QMAX, FLOOR, FORMAT, SWIZZLED, PADDING, RECIPROCAL, ROWS,
        ),
        num_rows_ptr, ends_ptr, rows, experts, ALIGNMENT, CHUNK, 1, ROWS,
    )  # fmt: skip


_launch = Launcher(NAME, _kernel)


def _plan(
    inputs: tuple[Any, ...],
    eps: float,
    weight_offset: float,
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

    Kept are the forms of q and scale, and the shape of the sum.
    """
    x, residual, _, num_rows, ends, _ = inputs
    (*lead, width), masked, count = x.shape, num_rows is not None, None if ends is None else len(ends)
    results = _blocks.results(
        tuple(lead), width, x.device, masked, ends is not None, group, quant_dtype, scale_format, scale_layout,
        scale_min, reciprocal, fill,
    )  # fmt: skip
    kept = results, (0, width) if residual is None else (*x.shape,)
    changes: dict[int, Change] = dict.fromkeys((2, 3, 4), contiguous)
    if not masked:
        changes |= dict.fromkeys((0, 1), rows_together)
    taken = Taken(inputs, changes)
    if not prod(x.shape) or count == 0:
        return Plan(taken, kept=kept)
    experts, rows = lead if masked else (1, prod(lead))
    padded = next_power_of_2(-(-width // group)) * next_power_of_2(group)
    elements = next(most[1] for most in TILES if experts * rows * width <= most[0])
    tile_rows = max(1, elements // padded)
    if masked or ends is not None:
        tile_rows = min(tile_rows, ROWS_WITH_EXPERTS)
    shares = share_out(x.device, experts, rows, masked, count, 1, tile_rows)
    strides = [
        (None,) * 3 if tensor is None else tensor.stride() if masked else (0, *tensor.stride())
        for tensor in taken.ready[:2]
    ]
    fixed = (*strides[0], *strides[1], *results.fixed, tile_rows, alignment, shares.chunk)
    floats = max(eps, FP32_TINY), weight_offset, scale_ub  # a zero row must give zeros
    numbers = *floats, rows, shares.experts, *results.numbers
    warps = min(32, max(4, tile_rows * padded // WARP_ELEMENTS))
    return Plan(taken, Step(_launch, (shares.programs, 1, 1), taken, numbers, fixed, warps), kept=kept)


_plans = Plans(_plan)


def rms_norm_block_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
    expert_ends: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns q, scale and the sum, each rounded once."""
    inputs = x, residual, weight, num_rows, expert_ends, global_scale
    plan, addresses = _plans(
        *(inputs, eps, weight_offset, group_size, quant_dtype, scale_format, scale_layout, scale_ub, scale_min),
        *(reciprocal, expert_alignment, fill),
    )
    results, shape_of_total = plan.kept
    (total,) = new(x.device, (shape_of_total, x.dtype))
    q, scale = results.allocate(x.device)
    plan(inputs, addresses, (*results.writable(q, scale), total))
    return q, scale, total
