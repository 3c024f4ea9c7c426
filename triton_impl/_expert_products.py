"""Products of quantised rows with the weights of their experts, and each token's sum of what its experts give.

They are no ops: `polyfuse.runtime` takes them where this backend runs the op between them. Rows of an expert lie behind
those of the one before; only the device knows how many each has, so that nothing is read on the host and a graph can
hold the launches. A program computes a tile of one expert: a block of its rows by a block of its weight's rows. The
weight is the left operand, so that the matrix unit's long side is filled by it however few rows there are.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from polyfuse._torch.memory import new
from polyfuse.triton_impl._common import INTERPRETED, next_power_of_2, round_to, widen
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl._plans import Plan, Plans, Step, Taken, adjacent, contiguous

ARCH = 8, 9  # of an NVIDIA GPU: from it on matrix units take float8_e4m3fn
GROUP = tl.constexpr(128)  # rows and columns of a weight, and columns of an activation, that share a scale
STAGES = 4
LEAST_ROWS, MOST_ROWS = 16, 64  # of a tile
COLUMNS_OF_TILE, COLUMNS_OF_FEW, WARPS = 128, 64, 4  # the second for calls of up to FEW rows, which are few tiles
FEW = 64
MOST_CHOSEN, FEW_CHOSEN = 4096, 1024  # experts of tokens that a program looks at together, and with four warps
COLUMNS, SUM_WARPS = 1024, 4  # that a program sums up
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}  # of results


@triton.jit
def _tile_of_experts(ends_ptr, tile, rows, experts, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whose tile it is, its first row and the end of its expert's rows; the expert is `experts` past the last tile."""
    place = tl.arange(0, CHUNK)
    end = tl.load(ends_ptr + place, mask=place < experts, other=0)
    begin = tl.load(ends_ptr + place - 1, mask=(place < experts) & (place > 0), other=0)
    count = tl.maximum(tl.minimum(end, rows) - begin, 0)
    tiles = tl.cumsum((count + BLOCK_M - 1) // BLOCK_M, 0)  # of all experts up to one
    expert = tl.minimum(tl.sum((tiles <= tile).to(tl.int32), 0), experts)
    before = tl.max(tl.where(tiles <= tile, tiles, 0), 0)
    own = place == expert
    first = tl.sum(tl.where(own, begin, 0), 0) + (tile - before) * BLOCK_M
    return expert, first, tl.minimum(tl.sum(tl.where(own, end, 0), 0), rows)


@triton.jit(do_not_specialize=["rows"])
def _products(
    x_ptr,  # [tokens, K]
    x_scale_ptr,  # [tokens, K / GROUP]
    w_ptr,  # [experts, N, K]
    w_scale_ptr,  # [experts, N / GROUP, K / GROUP]
    tokens_ptr,  # [rows], or None: row i is that of token i
    ends_ptr,  # [experts]
    out_ptr,  # [rows, N]
    rows,
    experts,
    x_row,
    scale_row,
    scale_group,
    w_expert,
    w_row,
    N: tl.constexpr,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    BLOCKS: tl.constexpr = N // BLOCK_N
    tile = tl.program_id(0) // BLOCKS
    column = (tl.program_id(0) % BLOCKS) * BLOCK_N
    expert, first, end = _tile_of_experts(ends_ptr, tile, rows, experts, CHUNK, BLOCK_M)
    if expert < experts:
        row = first + tl.arange(0, BLOCK_M)
        live = row < end
        token = row.to(tl.int64)
        if tokens_ptr is not None:
            token = tl.load(tokens_ptr + row, mask=live, other=0).to(tl.int64)
        columns = column + tl.arange(0, BLOCK_N)
        k = tl.arange(0, GROUP)
        x_at = x_ptr + token[None, :] * x_row + k[:, None]  # [GROUP, BLOCK_M]
        x_scale_at = x_scale_ptr + token * scale_row
        w_at = w_ptr + expert.to(tl.int64) * w_expert + columns.to(tl.int64)[:, None] * w_row + k[None, :]
        w_scale_at = w_scale_ptr + (expert.to(tl.int64) * (N // GROUP) + column // GROUP) * (K // GROUP)
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for _ in tl.range(0, K // GROUP):
            w = tl.load(w_at)
            x = tl.load(x_at, mask=live[None, :], other=0.0)
            x_scale = tl.load(x_scale_at, mask=live, other=0.0)
            if INTERPRETED:
                w = widen(w)
                x = widen(x)
            total += tl.dot(w, x) * x_scale[None, :] * tl.load(w_scale_at)
            w_at += GROUP
            x_at += GROUP
            x_scale_at += scale_group
            w_scale_at += 1
        target = out_ptr + row.to(tl.int64)[None, :] * N + columns[:, None]
        tl.store(target, round_to(total, DTYPE), mask=live[None, :])


@triton.jit
def _expert_of(chosen_ptr, i, count, experts):
    """The experts chosen in places i: `experts` for those that are not here, and one more past the last place."""
    chosen = tl.load(chosen_ptr + i, mask=i < count, other=0)
    here = (chosen >= 0) & (chosen < experts)
    return tl.where(i < count, tl.where(here, chosen, experts), experts + 1).to(tl.int32)


@triton.jit(do_not_specialize=["count"])
def _route(
    chosen_ptr,  # [count]
    tokens_ptr,  # [count]
    ends_ptr,  # [experts]
    places_ptr,  # [count]
    count,
    experts,
    CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows of one expert, in the order of `chosen`; the last program has those of experts on other devices."""
    expert = tl.program_id(0)
    before = expert * 0
    own = expert * 0
    for start in tl.range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        of = _expert_of(chosen_ptr, i, count, experts)
        before += tl.sum((of < expert).to(tl.int32), 0)
        own += tl.sum((of == expert).to(tl.int32), 0)
    if expert < experts:
        tl.store(ends_ptr + expert, before + own)
    if own > 0:
        for start in tl.range(0, count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            of = _expert_of(chosen_ptr, i, count, experts)
            mine = of == expert
            place = before + tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(tokens_ptr + place, i // CHOSEN, mask=mine)
            tl.store(places_ptr + i, place, mask=mine)
            before += tl.sum(mine.to(tl.int32), 0)


@triton.jit(do_not_specialize=["tokens"])
def _sums(
    results_ptr,  # [rows, N]
    weights_ptr,  # [tokens, CHOSEN]
    places_ptr,  # [tokens, CHOSEN]
    ends_ptr,  # [experts]
    out_ptr,  # [tokens, N]
    tokens,
    experts,
    N: tl.constexpr,
    CHOSEN: tl.constexpr,
    BY_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each token's results by its weights, rounded, and summed up in fp32: in the order of its places, or of k."""
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    WIDTH: tl.constexpr = next_power_of_2(CHOSEN)
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    written = tl.load(ends_ptr + experts - 1)
    k = tl.arange(0, WIDTH)
    places = tl.load(places_ptr + token * CHOSEN + k, mask=k < CHOSEN, other=2**31 - 1).to(tl.int64)
    weights = tl.load(weights_ptr + token * CHOSEN + k, mask=k < CHOSEN, other=0.0)
    weights = widen(round_to(widen(weights), out_ptr.dtype.element_ty))
    rank = k
    if BY_PLACE:
        rank = tl.sum((places[None, :] < places[:, None]).to(tl.int32), 1)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(CHOSEN):
        place = tl.sum(tl.where(rank == i, places, 0), 0)
        weight = tl.sum(tl.where(rank == i, weights, 0.0), 0)
        end = tl.where(place < written, N, 0)
        result = tl.load(results_ptr + place * N + column, mask=column < end, other=0.0)
        weighted = widen(round_to(widen(result) * weight, result.dtype))
        total += tl.where(column < end, weighted, 0.0)  # 0 times an infinite weight
    target = out_ptr + token * N + column
    tl.store(target, round_to(total, out_ptr.dtype.element_ty), mask=column < N)


_launch_products = Launcher("block_scaled_mm_by_expert", _products, num_stages=STAGES)
_launch_route = Launcher("route", _route)
_launch_sums = Launcher("sums_of_experts", _sums, enable_fp_fusion=False)  # in fp32 a product is rounded too


def _plan_products(inputs: tuple[Any, ...], rows: int, dtype: torch.dtype) -> Plan:
    """How a call with these inputs, in the order of the kernel's parameters, is launched; `dtype` is the result's."""
    taken = Taken(inputs, {0: adjacent, 2: adjacent, 3: contiguous, 4: contiguous, 5: contiguous})
    x, scales, weights, *_ = taken.ready
    experts, n, k = weights.shape
    block_m = min(max(next_power_of_2(-(-rows // experts)), LEAST_ROWS), MOST_ROWS)
    block_n = COLUMNS_OF_FEW if rows <= FEW else COLUMNS_OF_TILE
    strides = x.stride(0), *scales.stride(), *weights.stride()[:2]
    fixed = experts, *strides, n, k, DTYPES[dtype], next_power_of_2(experts), block_m, block_n
    tiles = min(rows, (rows + experts * (block_m - 1)) // block_m)  # at most: each expert's last one may be short
    return Plan(taken, Step(_launch_products, (tiles * (n // block_n), 1, 1), taken, (rows,), fixed, WARPS))


def _plan_route(inputs: tuple[Any, ...], experts: int) -> Plan:
    """How a call with these experts of tokens is launched."""
    taken = Taken(inputs, {0: contiguous})
    tokens, chosen = inputs[0].shape
    count = tokens * chosen
    block = min(max(next_power_of_2(count), LEAST_ROWS), MOST_CHOSEN)
    warps = 4 if block <= FEW_CHOSEN else 8
    return Plan(taken, Step(_launch_route, (experts + 1, 1, 1), taken, (count,), (experts, chosen, block), warps))


def _plan_sums(inputs: tuple[Any, ...], by_place: bool) -> Plan:
    """How a call with these inputs, in the order of the kernel's parameters, is launched."""
    taken = Taken(inputs, dict.fromkeys(range(len(inputs)), contiguous))
    results, weights, _, ends = taken.ready
    (tokens, chosen), columns = weights.shape, results.shape[1]
    fixed = len(ends), columns, chosen, by_place, COLUMNS
    return Plan(taken, Step(_launch_sums, (tokens * -(-columns // COLUMNS), 1, 1), taken, (tokens,), fixed, SUM_WARPS))


_plans_of_products, _plans_of_route, _plans_of_sums = Plans(_plan_products), Plans(_plan_route), Plans(_plan_sums)


def route(chosen: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of `chosen` [tokens, k] the token of each row, the end of each expert's rows, and the rows [tokens, k]."""
    places, tokens, ends = new(
        chosen.device, ((*chosen.shape,), torch.int32), ((chosen.numel(),), torch.int32), ((experts,), torch.int32)
    )
    plan, addresses = _plans_of_route((chosen,), experts)
    plan((chosen,), addresses, (tokens, ends, places))
    return tokens, ends, places


def products(
    values: torch.Tensor,
    scales: torch.Tensor,
    weights: torch.Tensor,
    weight_scales: torch.Tensor,
    ends: torch.Tensor,
    tokens: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[rows, N], of which those past the last expert's end are not written.

    Row i is that of `tokens[i]`, without them row i, times the weight of the expert that it lies with.
    """
    rows = len(values) if tokens is None else len(tokens)
    (out,) = new(values.device, ((rows, weights.shape[1]), dtype))
    if out.numel():
        inputs = values, scales, weights, weight_scales, tokens, ends
        plan, addresses = _plans_of_products(inputs, rows, dtype)
        plan(inputs, addresses, (out,))
    return out


def sums(
    results: torch.Tensor, weights: torch.Tensor, places: torch.Tensor, ends: torch.Tensor, by_place: bool
) -> torch.Tensor:
    """[tokens, N]: of `results` [rows, N] each token's rows `places` [tokens, k] by its `weights`, summed up.

    The order is that of the places, or of k. Weights and products are rounded to the dtype of the results, and the sum
    once. Rows past the last expert's end add nothing.
    """
    (out,) = new(results.device, ((len(places), results.shape[1]), results.dtype))
    if out.numel():
        inputs = results, weights, places, ends
        plan, addresses = _plans_of_sums(inputs, by_place)
        plan(inputs, addresses, (out,))
    return out
