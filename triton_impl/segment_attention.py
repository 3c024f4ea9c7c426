"""The Triton backend of `segment_attention`, for head dims that are no power of two.

It is a FlashAttention forward pass: blocks of queries against blocks of keys, with an online softmax in fp32. A tile
has a power of two of columns, so the head dim is split in two: 72 is computed as 64 + 16, where one tile takes 128.
"""

from math import log2
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from polyfuse._torch.memory import new
from polyfuse.spec import Deferral
from polyfuse.triton_impl._common import INTERPRETED, capability, next_power_of_2, round_to
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl._plans import Change, Plan, Plans, Step, Taken

NAME = "segment_attention"

CAPABILITY = capability(
    multiples={"dim": 8},
    ranges={"dim": (16, 128)},
    # FlashAttention-2 computes in multiples of 32 columns: of these dims it pads none.
    defers=(Deferral("cuda", "PyTorch's own kernel is faster there", {"dim": 32}),),
)


class Tiling(NamedTuple):
    """How the kernel runs on batches of up to `rows` rows."""

    rows: int
    block_queries: int
    block_keys: int
    warps: int
    stages: int


# On an H200, at 16 heads of 72: the best of eight or within 6% of it, for one image of 256 to 4096 rows and several.
TILINGS: tuple[Tiling, ...] = (Tiling(2048, 64, 128, 4, 2), Tiling(2**31, 64, 64, 4, 3))


@triton.jit
def _tile(ptr, stride, live, FIRST: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """Rows of one head, their columns from FIRST on: zero where a row is not live, or past the head dim."""
    column = FIRST + tl.arange(0, COLUMNS)
    mask = live[:, None]
    if FIRST + COLUMNS > D:
        mask = mask & (column < D)[None, :]
    value = tl.load(ptr + tl.arange(0, ROWS)[:, None] * stride + column[None, :], mask=mask, other=0.0)
    return value.to(tl.float32) if INTERPRETED else value  # bf16 arithmetic is wrong in the interpreter


@triton.jit(do_not_specialize=["segments"])
def _kernel(
    q_ptr,  # [rows, heads, D]
    k_ptr,
    v_ptr,
    boundaries_ptr,  # [segments + 1]
    out_ptr,  # [rows, heads, D]
    segments,
    scale,  # for exp2
    q_row,  # strides, in units of 8 elements
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    SPLIT: tl.constexpr = D > MAIN
    program = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)

    # The programs of a segment start at start // BLOCK_M + segment: room for its blocks, however it lies.
    index = tl.arange(0, SEGMENTS)
    first = tl.load(boundaries_ptr + index, mask=index < segments, other=0) // BLOCK_M + index
    segment = tl.sum(((index < segments) & (first <= program)).to(tl.int32), 0) - 1
    start = tl.load(boundaries_ptr + segment)
    length = tl.load(boundaries_ptr + segment + 1) - start
    begin = (program - start // BLOCK_M - segment) * BLOCK_M
    if begin >= length:
        return

    # Multiplied here, so that the compiler sees rows that start at 16 bytes.
    q_ptr += (start + begin).to(tl.int64) * (q_row * 8) + head * (q_head * 8)
    k_ptr += start.to(tl.int64) * (k_row * 8) + head * (k_head * 8)
    v_ptr += start.to(tl.int64) * (v_row * 8) + head * (v_head * 8)
    query = tl.arange(0, BLOCK_M)
    inside = query < length - begin
    q1 = _tile(q_ptr, q_row * 8, inside, 0, MAIN, BLOCK_M, D)
    q2 = _tile(q_ptr, q_row * 8, inside, MAIN, REST, BLOCK_M, D) if SPLIT else q1
    acc1 = tl.zeros([BLOCK_M, MAIN], tl.float32)
    acc2 = tl.zeros([BLOCK_M, REST], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # The last block too is masked in this loop: with a step of its own behind it Triton 3.6 computes acc2 wrongly.
    for key in tl.range(0, length, BLOCK_N):
        live = key + tl.arange(0, BLOCK_N) < length
        score = tl.dot(q1, tl.trans(_tile(k_ptr, k_row * 8, live, 0, MAIN, BLOCK_N, D)), input_precision="ieee")
        if SPLIT:
            rest = tl.trans(_tile(k_ptr, k_row * 8, live, MAIN, REST, BLOCK_N, D))
            score = tl.dot(q2, rest, score, input_precision="ieee")
        score = tl.where(live[None, :], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1) * scale)
        weight = tl.exp2(score * scale - new_peak[:, None])  # [BLOCK_M, BLOCK_N]
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weight, 1)
        weight = weight.to(q1.dtype)
        value = _tile(v_ptr, v_row * 8, live, 0, MAIN, BLOCK_N, D)
        acc1 = tl.dot(weight, value, acc1 * shrink[:, None], input_precision="ieee")
        if SPLIT:
            value = _tile(v_ptr, v_row * 8, live, MAIN, REST, BLOCK_N, D)
            acc2 = tl.dot(weight, value, acc2 * shrink[:, None], input_precision="ieee")
        peak = new_peak
        k_ptr += BLOCK_N * (k_row * 8)
        v_ptr += BLOCK_N * (v_row * 8)

    inverse = (1.0 / total)[:, None]
    out_row = out_ptr + ((start + begin).to(tl.int64) * HEADS + head) * D + (query * (HEADS * D))[:, None]
    column = tl.arange(0, MAIN)[None, :]
    tl.store(out_row + column, round_to(acc1 * inverse, out_ptr.dtype.element_ty), mask=inside[:, None])
    if SPLIT:
        column = MAIN + tl.arange(0, REST)[None, :]
        mask = inside[:, None] & (column < D)
        tl.store(out_row + column, round_to(acc2 * inverse, out_ptr.dtype.element_ty), mask=mask)


_launches = {tiling.stages: Launcher(NAME, _kernel, num_stages=tiling.stages) for tiling in TILINGS}


def _split(head_dim: int) -> tuple[int, int]:
    """Columns of the main tile and of the tile that takes the rest."""
    main = 1 << head_dim.bit_length() - 1
    return main, max(16, next_power_of_2(head_dim - main))


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy whose rows start at multiples of 16 bytes and whose strides are multiples of 8."""
    whole = tensor.stride(2) == 1 and not any(n % 8 for n in tensor.stride()[:2])
    return tensor if whole and tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)


def _boundaries(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Behind one another, and in the integers that a program counts its keys in."""
    return cu_seqlens.to(torch.int32).contiguous()


CHANGES: dict[int, Change] = {0: _aligned, 1: _aligned, 2: _aligned, 3: _boundaries}


def _plan(inputs: tuple[Any, ...], scale: float | None) -> Plan:
    """How a call with these inputs, in the order of the kernel's parameters, is launched."""
    taken = Taken(inputs, CHANGES)
    q, k, v, boundaries = taken.ready
    (rows, heads, dim), segments = q.shape, len(boundaries) - 1
    tiling = next(tiling for tiling in TILINGS if rows <= tiling.rows)
    main, rest = _split(dim)
    strides = [stride // 8 for tensor in (q, k, v) for stride in tensor.stride()[:2]]
    grid = (rows // tiling.block_queries + segments, heads, 1)
    numbers = (segments, (dim**-0.5 if scale is None else scale) * log2(torch.e))
    sizes = (heads, dim, main, rest, next_power_of_2(segments), tiling.block_queries, tiling.block_keys)
    return Plan(taken, Step(_launches[tiling.stages], grid, taken, numbers, (*strides, *sizes), tiling.warps))


_plans = Plans(_plan)


def segment_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """out [rows, heads, dim], rounded once.

    A tensor is copied first unless its last stride is 1, its others are multiples of 8, and it starts at a multiple of
    16 bytes. Nothing is read on the host, with or without `max_seqlen`.
    """
    (out,) = new(q.device, ((*q.shape,), q.dtype))
    if q.numel() and len(cu_seqlens) > 1:
        inputs = q, k, v, cu_seqlens
        plan, addresses = _plans(inputs, scale)
        plan(inputs, addresses, (out,))
    return out
