"""The Triton backend of `gated_rms_norm`: one launch, each element read once.

Rows are numbered through; a program takes ROWS consecutive ones, whole. Their leading dimensions become as few as the
strides of x and of the gate allow.
"""

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from polyfuse._torch.memory import new
from polyfuse.spec import FP32_TINY
from polyfuse.triton_impl._common import capability, next_power_of_2, round_to, widen
from polyfuse.triton_impl._gdn import fast_sigmoid, silu, sum_of_squares
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl._plans import Plan, Plans, Step, Taken, contiguous
from polyfuse.triton_impl._tuning import Ranges, Tiles

NAME = "gated_rms_norm"

CAPABILITY = capability(ranges={"V": (0, 2**15)})

# Up to this many elements of x: elements per program, warps. Few rows need many programs; of many, each program has
# several loads in flight. A load is 16 bytes of 16-bit numbers.
RANGES: Ranges = ((2**18, (512, 2)), (2**63, (2048, 4)))
WARP_ELEMENTS = 512  # at most, in a long row
WIDE_ROWS = 2**31  # from here on rows are numbered in 64 bits
MOST_DIMS = 3  # that rows are numbered in

Leading = list[tuple[int, int, int]]  # a size, and the stride of x and of the gate


@triton.jit(do_not_specialize=["rows", "middle", "inner"])
def _kernel(
    x_ptr,  # [outer, middle, inner, V]
    gate_ptr,  # the same
    weight_ptr,  # [V]
    y_ptr,  # [rows, V]
    eps,
    offset,
    rows,
    middle,
    inner,
    x_outer_stride,
    x_middle_stride,
    x_inner_stride,
    gate_outer_stride,
    gate_middle_stride,
    gate_inner_stride,
    DIMS: tl.constexpr,  # with 2 there is no middle, with 1 inner is all rows
    V: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    COLUMNS: tl.constexpr = next_power_of_2(V)
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.uint32
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS).to(INDEX)  # [ROWS]
    live = row < rows.to(INDEX)
    source = tl.minimum(row, rows.to(INDEX) - 1)  # past the last row it is read again: cheaper than a mask
    x_row = source.to(tl.int64) * x_inner_stride
    gate_row = source.to(tl.int64) * gate_inner_stride
    if DIMS > 1:
        outer = source // inner.to(INDEX)
        last = (source - outer * inner.to(INDEX)).to(tl.int64)
        x_row = last * x_inner_stride
        gate_row = last * gate_inner_stride
        if DIMS > 2:
            between = outer
            outer = between // middle.to(INDEX)
            between = (between - outer * middle.to(INDEX)).to(tl.int64)
            x_row += between * x_middle_stride
            gate_row += between * gate_middle_stride
        x_row += outer.to(tl.int64) * x_outer_stride
        gate_row += outer.to(tl.int64) * gate_outer_stride

    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < V
    x = tl.load(x_ptr + x_row[:, None] + column, mask=inside, other=0.0, eviction_policy="evict_first")
    gate = tl.load(gate_ptr + gate_row[:, None] + column, mask=inside, other=0.0, eviction_policy="evict_first")
    # For each row anew, as a thread's part of a single row of weights would come to it through shared memory.
    weight = tl.load(weight_ptr + tl.zeros([ROWS, 1], tl.int32) + column, mask=inside, other=0.0)
    dtype: tl.constexpr = x.dtype
    x = widen(x)
    gate = widen(gate)
    total = sum_of_squares(tl.reshape(x, [ROWS, 1, COLUMNS]))  # [ROWS, 1]
    n = x * tl.rsqrt(tl.fma(total, 1.0 / V, eps))
    act = silu(gate) if SILU else fast_sigmoid(gate)
    y = round_to(n * (widen(weight) + offset) * act, dtype)
    tl.store(y_ptr + (row.to(tl.int64) * V)[:, None] + column, y, mask=live[:, None] & inside)


_launch = Launcher(NAME, _kernel)
TILES = Tiles(_launch, ("elements", "warps"), RANGES, ((256, 512, 1024, 2048, 4096), (1, 2, 4, 8)))


def _merged(shape: tuple[int, ...], x_strides: tuple[int, ...], gate_strides: tuple[int, ...]) -> Leading:
    """Leading dimensions, outermost first; neighbours that both arrays run through in even steps are one."""
    dims: Leading = []
    for size, x_stride, gate_stride in zip(shape, x_strides, gate_strides, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1:] == (size * x_stride, size * gate_stride):
            dims[-1] = (dims[-1][0] * size, x_stride, gate_stride)
        else:
            dims.append((size, x_stride, gate_stride))
    return dims


def _rows(
    shape: tuple[int, ...],
    x_strides: tuple[int, ...],
    gate_strides: tuple[int, ...],
    silu: bool,
    elements: int,
    warps: int,
) -> tuple[int, tuple[int, ...], tuple[int | bool, ...], int] | None:
    """The number of programs, what they take behind offset, that is numbers and fixed, and their warps.

    None where inputs must be copied first.
    """
    *lead, width = shape
    dims = _merged(tuple(lead), x_strides[:-1], gate_strides[:-1])
    if len(dims) > MOST_DIMS or (width > 1 and (x_strides[-1] != 1 or gate_strides[-1] != 1)):
        return None
    rows, columns = prod(lead), next_power_of_2(width)
    tile_rows = max(1, elements // columns)
    outer, *between, inner = [(1, 0, 0)] * (2 - len(dims)) + dims
    middle = between[0] if between else (1, 0, 0)
    strides = outer[1], middle[1], inner[1], outer[2], middle[2], inner[2]
    numbers = rows, middle[0], inner[0]
    fixed = *strides, max(1, len(dims)), width, silu, rows >= WIDE_ROWS, tile_rows
    return -(-rows // tile_rows), numbers, fixed, max(warps, columns // WARP_ELEMENTS)


def _to_copy(x: torch.Tensor, gate: torch.Tensor) -> list[int]:
    """The places of x and the gate if their rows are not of adjacent elements; if none is so, of both.

    That is where their rows have more strides together than a program counts in.
    """
    apart = [i for i, rows in enumerate((x, gate)) if rows.shape[-1] > 1 and rows.stride(-1) != 1]
    return apart or [0, 1]


def _plan(inputs: tuple[Any, ...], eps: float, silu: bool, weight_offset: float, forced: Any) -> Plan:
    """How a call with these inputs, in the order of the kernel's parameters, is launched.

    `forced` is what chooses the tiles in place of what was measured: with another one the same call has another plan.
    """
    elements, warps = TILES.choose(inputs[0].numel(), inputs[0].device)
    changes = {2: contiguous}
    taken = Taken(inputs, changes)
    while True:
        x, gate, _ = taken.ready
        found = _rows(x.shape, x.stride(), gate.stride(), silu, elements, warps)
        if found is not None:
            break
        changes |= dict.fromkeys(_to_copy(x, gate), contiguous)
        taken = Taken(inputs, changes)
    programs, numbers, fixed, warps = found
    floats = max(eps, FP32_TINY), weight_offset  # a zero row must give zeros
    return Plan(taken, Step(_launch, (programs, 1, 1), taken, (*floats, *numbers), fixed, warps))


_plans = Plans(_plan)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float = 1e-6,
    activation: str = "silu",
    weight_offset: float = 0.0,
) -> torch.Tensor:
    """Returns y [..., V], rounded once."""
    (y,) = new(x.device, ((*x.shape,), x.dtype))
    if y.numel():
        inputs = x, gate, weight
        plan, addresses = _plans(inputs, eps, activation == "silu", weight_offset, TILES.forced)
        plan(inputs, addresses, (y,))
    return y
