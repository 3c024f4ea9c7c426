"""The Triton backend of `silu_mul_block_quant`: one launch, each element read once.

The (row, group) pairs of an expert, or of all rows, are numbered through; a program takes BLOCK consecutive ones as a
tile [BLOCK, group_size]. A group never spans programs, so that no tile shape changes a bit.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from polyfuse.spec import Capability, Unsupported
from polyfuse.spec.silu_mul_block_quant import QMAX, scale_floor, scale_strides
from polyfuse.triton_impl._common import INTERPRETED, on_device, round_to, widen
from polyfuse.triton_impl._quantise import divide, exponent_byte, power_of_two_above, quantise

NAME = "silu_mul_block_quant"

CAPABILITY = Capability(devices=("cuda", "rocm", "xpu", "cpu"), interpreted=("cpu",))

TILE_BYTES = 4096  # of gate, and of up, per program, unless a group is larger
THREAD_BYTES = 32  # of gate, and of up, per thread: two loads of 16 bytes and one store
WIDEST_GROUP = 2**15
WIDE_PAIRS = 2**31  # from here on pairs are numbered in 64 bits

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _silu(gate, PRECISE: tl.constexpr):
    """gate * sigmoid(gate). PRECISE: bitwise what PyTorch computes on the same device."""
    if INTERPRETED:
        return tl.div_rn(gate, 1.0 + tl.exp(-gate))
    elif PRECISE:
        return tl.div_rn(gate, 1.0 + libdevice.exp(-gate))
    else:  # these two flush what is below the least normal number, which saves a third of the instructions
        return libdevice.fast_dividef(gate, 1.0 + libdevice.exp2(gate * -LOG2_E))


@triton.jit(do_not_specialize=["rows", "tiles", "scale_expert", "scale_row", "scale_group"])
def _kernel(
    x_ptr,  # [experts, rows, 2*D]
    num_rows_ptr,  # [experts], or None for one expert whose rows are all valid
    q_ptr,  # [experts, rows, D]
    scale_ptr,  # [experts, rows, GROUPS]; packed: bytes of int32 [experts, rows, GROUPS / 4]
    rows,
    tiles,  # per expert
    x_expert,
    x_row,
    x_column,
    scale_expert,
    scale_row,
    scale_group,
    scale_ub,
    limit,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    QMAX: tl.constexpr,
    FLOOR: tl.constexpr,
    SCALE_FORMAT: tl.constexpr,
    MATERIALIZE: tl.constexpr,
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
    up = tl.load(source + (column + D) * x_column, mask=inside, other=0.0, eviction_policy="evict_first")
    mask = live[:, None] & inside
    dtype: tl.constexpr = gate.dtype
    gate = widen(gate)
    up = widen(up)
    if limit is not None:  # comparisons with NaN are false: it stays
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    y = _silu(gate, MATERIALIZE)
    if MATERIALIZE:
        y = widen(round_to(widen(round_to(y, dtype)) * up, dtype))
    else:
        y = y * up

    # As integers the magnitudes have the same order, and NaN is above infinity.
    amax = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)  # [BLOCK]
    scale = tl.div_rn(amax, QMAX)
    if scale_ub is not None:
        scale = tl.where((scale > scale_ub) & (amax < float("inf")), scale_ub, scale)
    scale = tl.where(scale < FLOOR, FLOOR, scale)
    if SCALE_FORMAT != "float32":
        scale = power_of_two_above(scale)
    q = quantise(divide(y, scale, SCALE_FORMAT != "float32", scale_ub is None), QMAX, FORMAT, q_ptr.dtype.element_ty)
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
