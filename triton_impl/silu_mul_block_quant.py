"""The Triton backend of `silu_mul_block_quant`: one launch, each element read once.

The (row, group) pairs of an expert, or of all rows, are numbered through; a program takes BLOCK consecutive ones as a
tile [BLOCK, group_size]. A group never spans programs, so that no tile shape changes a bit.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from polyfuse.spec import Capability, Unsupported
from polyfuse.spec.silu_mul_block_quant import LEAST_DIVISOR, QMAX, scale_floor, scale_strides
from polyfuse.triton_impl._common import INTERPRETED, LOG2_E, round_to, widen
from polyfuse.triton_impl._launch import Launch, Launcher
from polyfuse.triton_impl._quantise import divide, exponent_byte, power_of_two_above, quantise

NAME = "silu_mul_block_quant"

CAPABILITY = Capability(devices=("cuda", "rocm", "xpu", "cpu"), interpreted=("cpu",))

# (up to this many bytes of gate, bytes of gate per program, per thread), of groups from 128 columns on, and smaller.
# A program takes at least one group. Few rows need many programs, each of which loads 16 bytes at a time.
TILES = ((2**18, 512, 16), (2**63, 2048, 32))
SMALL_GROUP_TILES = ((2**18, 512, 16), (2**63, 4096, 32))
WIDEST_GROUP = 2**15
WIDE_PAIRS = 2**31  # from here on pairs are numbered in 64 bits

LEAST = tl.constexpr(LEAST_DIVISOR)


@triton.jit
def _silu(gate):
    """gate * sigmoid(gate), bitwise what PyTorch computes on the same device."""
    if INTERPRETED:
        return tl.div_rn(gate, 1.0 + tl.exp(-gate))
    else:
        return tl.div_rn(gate, 1.0 + libdevice.exp(-gate))


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x))."""
    if INTERPRETED:
        return tl.div_rn(1.0, 1.0 + tl.exp(-x))
    else:  # these two flush to 0 what is below the least normal number, which saves a third of the instructions
        return libdevice.fast_dividef(1.0, 1.0 + libdevice.exp2(x * -LOG2_E))


@triton.jit(do_not_specialize=["num_rows_ptr", "rows", "tiles", "scale_expert", "scale_row", "scale_group"])
def _kernel(
    x_ptr,  # [experts, rows, 2*D], or the gate [experts, rows, D]
    up_ptr,  # [experts, rows, D], or None for the columns of x from D on
    num_rows_ptr,  # [experts], or None for one expert whose rows are all valid
    q_ptr,  # [experts, rows, D]
    scale_ptr,  # [experts, rows, GROUPS]; packed: bytes of int32 [experts, rows, GROUPS / 4]
    scale_ub,
    limit,
    rows,
    tiles,  # per expert
    scale_expert,
    scale_row,
    scale_group,
    x_expert,
    x_row,
    x_column,
    up_expert,
    up_row,
    up_column,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    QMAX: tl.constexpr,
    FLOOR: tl.constexpr,
    SCALE_FORMAT: tl.constexpr,
    MATERIALIZE: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    GROUPS: tl.constexpr = D // GROUP
    COLUMNS: tl.constexpr = triton.next_power_of_2(GROUP)
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.uint32
    tile = tl.program_id(0)
    valid = rows
    if num_rows_ptr is not None:
        expert = (tile // tiles).to(tl.int64)
        tile = tile % tiles
        valid = tl.minimum(tl.load(num_rows_ptr + expert), rows)
        if tile.to(tl.int64) * BLOCK >= valid.to(tl.int64) * GROUPS:
            return
        x_ptr += expert * x_expert
        if up_ptr is not None:
            up_ptr += expert * up_expert
        q_ptr += expert * rows * D
        scale_ptr += expert * scale_expert

    pair = tile.to(INDEX) * BLOCK + tl.arange(0, BLOCK).to(INDEX)  # [BLOCK]
    row = pair // GROUPS
    group = pair - row * GROUPS
    live = row < valid.to(INDEX)
    row = tl.minimum(row, valid.to(INDEX) - 1)  # past the last row it is read again: cheaper than a mask
    lane = tl.arange(0, COLUMNS)[None, :]
    column = (group * GROUP).to(tl.int64)[:, None] + lane  # [BLOCK, COLUMNS]
    source = x_ptr + row.to(tl.int64)[:, None] * x_row
    inside = lane < GROUP
    gate = tl.load(source + column * x_column, mask=inside, other=0.0, eviction_policy="evict_first")
    if up_ptr is None:
        ups = source + (column + D) * x_column
    else:
        ups = up_ptr + row.to(tl.int64)[:, None] * up_row + column * up_column
    up = tl.load(ups, mask=inside, other=0.0, eviction_policy="evict_first")
    mask = live[:, None] & inside
    dtype: tl.constexpr = gate.dtype
    gate = widen(gate)
    up = widen(up)
    if limit is not None:  # comparisons with NaN are false: it stays
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if MATERIALIZE:
        y = widen(round_to(widen(round_to(_silu(gate), dtype)) * up, dtype))
    else:
        y = gate * (_sigmoid(gate) * up)

    # As integers the magnitudes have the same order, and NaN is above infinity.
    amax = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)  # [BLOCK]
    if RECIPROCAL:
        scale = amax * (1 / QMAX)
    else:
        scale = tl.div_rn(amax, QMAX)
    if scale_ub is not None:
        scale = tl.where((scale > scale_ub) & (amax < float("inf")), scale_ub, scale)
    scale = tl.where(scale < FLOOR, FLOOR, scale)
    if SCALE_FORMAT != "float32":
        scale = power_of_two_above(scale)
    divisor = scale
    if FLOOR == 0:
        divisor = tl.where(scale < LEAST, LEAST, scale)
    q = quantise(divide(y, divisor, SCALE_FORMAT != "float32", scale_ub is None), QMAX, FORMAT, q_ptr.dtype.element_ty)
    tl.store(q_ptr + (pair.to(tl.int64) * GROUP)[:, None] + lane, q, mask=mask)

    scale_at = scale_ptr + row.to(tl.int64) * scale_row
    if SCALE_FORMAT == "ue8m0_packed":
        scale_at += (group // 4).to(tl.int64) * scale_group
        byte = scale_at.to(tl.pointer_type(tl.uint8), bitcast=True) + group % 4
        tl.store(byte, exponent_byte(scale), mask=live)
        for i in tl.static_range(1, 4 - (GROUPS - 1) % 4):
            tl.store(byte + i, tl.zeros([BLOCK], tl.uint8), mask=live & (group == GROUPS - 1))
    else:
        tl.store(scale_at + group.to(tl.int64) * scale_group, scale, mask=live)


_launch = Launcher(NAME, _kernel)


@dataclass(slots=True)
class _Plan:
    """What depends on a call's signature alone, and the launch for it, which the first call finds."""

    q_shape: tuple[int, ...]
    q_dtype: torch.dtype
    emulated: bool
    scale_shape: tuple[int, ...]
    scale_strides: tuple[int, ...] | None
    scale_dtype: torch.dtype
    grid: tuple[int, int, int]
    numbers: tuple[int, ...]  # behind scale_ub and limit
    fixed: tuple[Any, ...]
    warps: int
    launch: Launch | None = None


def _converts(device: torch.device, quant_dtype: str) -> bool:
    """Whether Triton's cast to this fp8 dtype is right there: to nearest even, saturating, from fp32 at once."""
    if INTERPRETED.value or device.type != "cuda" or torch.version.hip or quant_dtype == "float8_e4m3fnuz":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _tile(group: int, itemsize: int, elements: int) -> tuple[int, int]:
    """How many groups and warps a program has."""
    columns = triton.next_power_of_2(group)
    tiles = TILES if group >= 128 else SMALL_GROUP_TILES
    tile_bytes, thread_bytes = next(t[1:] for t in tiles if elements * itemsize <= t[0])
    groups = max(1, tile_bytes // itemsize // columns)
    return groups, min(32, max(4, groups * columns * itemsize // thread_bytes // 32))


@lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    up_strides: tuple[int, ...] | None,
    dtype: torch.dtype,
    device: torch.device,
    masked: bool,
    group: int,
    quant_dtype: str,
    scale_format: str,
    scale_layout: str,
    scale_min: float | None,
    materialize: bool,
    reciprocal: bool,
    *launched_by: bool,
) -> _Plan:
    """`strides` are those of x as [experts, rows, width] if `masked`, else as [rows, width]; `up_strides` those of up.

    `launched_by` is what else tells one launch from another.
    """
    if group > WIDEST_GROUP:
        raise Unsupported(f"{NAME}: group_size={group}: a program takes whole groups of up to {WIDEST_GROUP}")
    lead, width = shape[:-1], shape[-1] // 2 if up_strides is None else shape[-1]
    experts, rows = (lead[0], lead[1]) if masked else (1, prod(lead))
    groups = width // group
    packed = scale_format == "ue8m0_packed"
    columns = -(-groups // 4) if packed else groups
    layout = scale_strides(lead, columns, scale_layout, masked)
    scale_row, scale_group = (columns, 1) if layout is None else (1, layout[-1])
    scale_expert = 0 if not masked else rows * columns if layout is None else layout[0]
    block, warps = _tile(group, dtype.itemsize, experts * rows * width)
    tiles = -(-rows * groups // block)
    fixed = (
        *(strides if masked else (0, *strides)),
        *((None, None, None) if up_strides is None else up_strides if masked else (0, *up_strides)),
        width,
        group,
        quant_dtype,
        QMAX[quant_dtype],
        scale_floor(quant_dtype, scale_min),
        scale_format,
        materialize,
        reciprocal,
        rows * groups >= WIDE_PAIRS,
        block,
    )
    return _Plan(
        q_shape=(*lead, width),
        q_dtype=getattr(torch, quant_dtype),
        emulated=quant_dtype != "int8" and not _converts(device, quant_dtype),
        scale_shape=(*lead, columns),
        scale_strides=layout,
        scale_dtype=torch.int32 if packed else torch.float32,
        grid=(experts * tiles, 1, 1),
        numbers=(rows, tiles, scale_expert, scale_row, scale_group),
        fixed=fixed,
        warps=warps,
    )


def silu_mul_block_quant(
    x: torch.Tensor,
    *,
    up: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
    group_size: int = 128,
    quant_dtype: str = "float8_e4m3fn",
    scale_format: str = "float32",
    scale_layout: str = "row_major",
    scale_ub: float | None = None,
    scale_min: float | None = None,
    limit: float | None = None,
    materialize: bool = False,
    reciprocal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns q and scale, each rounded once."""
    shape = x.shape
    if num_rows is None:
        if len(shape) > 2:
            x = x.flatten(0, -2)
            up = up if up is None else up.flatten(0, -2)
    elif num_rows.stride(0) != 1:
        num_rows = num_rows.contiguous()
    plan = _plan(
        shape,
        x.stride(),
        up if up is None else up.stride(),
        x.dtype,
        x.device,
        num_rows is not None,
        group_size,
        quant_dtype,
        scale_format,
        scale_layout,
        scale_min,
        materialize,
        reciprocal,
        scale_ub is None,
        limit is None,
        x.data_ptr() % 16 == 0,
        up is None or up.data_ptr() % 16 == 0,
    )
    q = torch.empty(plan.q_shape, dtype=plan.q_dtype, device=x.device)
    if plan.scale_strides is None:
        scale = torch.empty(plan.scale_shape, dtype=plan.scale_dtype, device=x.device)
    else:
        scale = torch.empty_strided(plan.scale_shape, plan.scale_strides, dtype=plan.scale_dtype, device=x.device)
    if plan.grid[0] == 0:
        return q, scale
    codes = q.view(torch.uint8) if plan.emulated else q
    if plan.launch is None:
        numbers = scale_ub, limit, *plan.numbers
        plan.launch = _launch.find((x, up, num_rows, codes), numbers, plan.fixed, plan.warps)
    plan.launch(plan.grid, x, up, num_rows, codes, scale, scale_ub, limit, *plan.numbers, *plan.fixed)
    return q, scale
