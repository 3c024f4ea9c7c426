"""The Triton backend of `gated_delta_rule`: two launches, which work on chunks of 64 rows of a sequence.

With G the sum of g from the beginning of the chunk, S the state before the chunk, and d as in the spec:

    M[i, j] = beta[i] * (k[i] . k[j]) * exp(G[i] - G[j]) for j < i, else 0
    d       = (I + M)^-1 (beta * (v - exp(G) * (k S)))
    o       = scale * (exp(G) * (q S) + P d)        P[i, j] = (q[i] . k[j]) * exp(G[i] - G[j]) for j <= i, else 0
    S       = exp(G[last]) * S + k^T (exp(G[last] - G) * d)

`_prepare` computes all that needs no state, each chunk on its own: T = (I + M)^-1 beta, P and the exponentials. `_scan`
walks from chunk to chunk of a sequence, with a block of the value's columns. Had `_prepare` multiplied T with v and k
too, the scan would have one product of five less, but more would be written and read than in all of it now.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from polyfuse._torch.memory import new
from polyfuse.spec import gated_delta_rule as spec
from polyfuse.triton_impl._common import capability, cdiv, next_power_of_2, round_to, widen
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl._plans import Plan, Plans, Step, Taken, adjacent, contiguous
from polyfuse.triton_impl._products import FP32, TO_BF16, dot, load_operand, rounded_operand, unit_inverse

NAME = "gated_delta_rule"

CAPABILITY = capability(
    ranges={"K": (0, 256)},
)

ROWS = tl.constexpr(spec.CHUNK)
LEAST_G = tl.constexpr(spec.LEAST_G)  # sums of it are finite, so that no difference is NaN
SEARCH = tl.constexpr(256)  # entries of cu_seqlens looked at together
NEVER = tl.constexpr(2**31 - 1)  # a slot that does not come


@triton.jit
def _place(cu_ptr, sequences, length, slot):
    """The sequence of a slot, the row that its chunk begins with, and the one that its sequence ends before.

    The slots of sequence s start at cu[s] // ROWS + s + 1: room for its chunks, however it lies. Rows before the first
    sequence are sequence -1, and those after the last one sequence `sequences`. Slots without rows begin past the end.
    """
    sequence = -1
    for start in range(0, sequences + 1, SEARCH):
        index = start + tl.arange(0, SEARCH)
        first = tl.load(cu_ptr + index, mask=index <= sequences, other=NEVER).to(tl.int32) // ROWS + index + 1
        sequence += tl.sum(((index <= sequences) & (first <= slot)).to(tl.int32), 0)
    first = tl.load(cu_ptr + sequence, mask=sequence >= 0, other=0).to(tl.int32)
    end = tl.load(cu_ptr + sequence + 1, mask=sequence < sequences, other=0).to(tl.int32)
    end = tl.where(sequence < sequences, end, length)
    return sequence, first + (slot - first // ROWS - sequence - 1) * ROWS, end


@triton.jit(do_not_specialize=["length", "sequences"])
def _prepare(
    q_ptr,  # [length, H, K]
    k_ptr,  # [length, H, K]
    g_ptr,  # [length, HV]
    beta_ptr,  # [length, HV]
    cu_ptr,  # [sequences + 1] or None
    t_ptr,  # [HV, length, ROWS]
    p_ptr,  # [HV, length, ROWS]
    decay_ptr,  # [HV, length, 2]: exp(G) and exp(G[last] - G)
    o_ptr,  # [length, HV, V]: zero in rows outside of all sequences
    length,
    sequences,
    q_row,
    q_head,
    k_row,
    k_head,
    g_row,
    g_head,
    beta_row,
    beta_head,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DTYPE: tl.constexpr,
):
    program = tl.program_id(0)
    head = (program % HV).to(tl.int64)
    slot = program // HV
    sequence = slot * 0
    begin = slot * ROWS
    end = sequence + length
    if cu_ptr is not None:
        sequence, begin, end = _place(cu_ptr, sequences, length, slot)
    rows = end - begin
    if rows <= 0:
        return

    i = tl.arange(0, ROWS)
    row = begin + i.to(tl.int64)
    live = i < rows
    if (sequence < 0) | (sequence >= sequences):
        zero = tl.zeros([ROWS, ROWS], o_ptr.dtype.element_ty)
        for first in range(0, V, ROWS):
            value = first + i[None, :]
            tl.store(o_ptr + (row * HV + head)[:, None] * V + value, zero, mask=live[:, None] & (value < V))
        return

    key_head = head // (HV // H)
    key = tl.arange(0, next_power_of_2(max(16, K)))[None, :]
    keys = live[:, None] & (key < K)
    q = load_operand(q_ptr + row[:, None] * q_row + (key_head * q_head + key), keys)
    k = load_operand(k_ptr + row[:, None] * k_row + (key_head * k_head + key), keys)
    g = tl.load(g_ptr + row * g_row + head * g_head, mask=live, other=0.0)
    beta = tl.load(beta_ptr + row * beta_row + head * beta_head, mask=live, other=0.0)
    G = tl.cumsum(tl.where(g < LEAST_G, LEAST_G, g), 0)  # where keeps NaN
    past = i[:, None] >= i[None, :]
    decay = tl.exp(tl.where(past, G[:, None] - G[None, :], 0.0))
    here = head * length + row
    tile = here[:, None] * ROWS + i[None, :]
    p = tl.where(past, dot(q, tl.trans(k)) * decay, 0.0)
    tl.store(p_ptr + tile, round_to(p, DTYPE), mask=live[:, None])
    total = tl.sum(tl.where(i == tl.minimum(rows, ROWS) - 1, G, 0.0), 0)
    tl.store(decay_ptr + here * 2, tl.exp(G), mask=live)
    tl.store(decay_ptr + here * 2 + 1, tl.exp(total - G), mask=live)
    M = tl.where(past & (i[:, None] != i[None, :]), beta[:, None] * dot(k, tl.trans(k)) * decay, 0.0)
    t = unit_inverse(M, TO_BF16 if tl.bfloat16 == DTYPE else FP32) * beta[None, :]
    tl.store(t_ptr + tile, round_to(t, DTYPE), mask=live[:, None])


@triton.jit(do_not_specialize=["length", "slots"])
def _scan(
    q_ptr,  # [length, H, K]
    k_ptr,  # [length, H, K]
    v_ptr,  # [length, HV, V]
    cu_ptr,  # [sequences + 1] or None
    initial_ptr,  # [slots, HV, K, V] or None
    index_ptr,  # [sequences], each one's slot of a pool, or None
    has_ptr,  # [sequences], whether each one begins with what its slot holds, or None
    t_ptr,  # as in _prepare
    p_ptr,
    decay_ptr,
    o_ptr,  # [length, HV, V]
    final_ptr,  # [slots, HV, K, V], written if FINAL; a pool is the initial one too
    length,
    slots,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    initial_slot,
    initial_head,
    initial_key,
    initial_value,
    final_slot,
    final_head,
    final_key,
    final_value,
    H: tl.constexpr,
    HV: tl.constexpr,
    COLUMNS: tl.constexpr,  # of q and k: K, or more that are zero
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FINAL: tl.constexpr,
    DTYPE: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCKS: tl.constexpr = cdiv(V, BLOCK_V)
    PADDED_K: tl.constexpr = next_power_of_2(max(16, K))
    program = tl.program_id(0)
    first_value = program % BLOCKS * BLOCK_V
    head = (program // BLOCKS % HV).to(tl.int64)
    sequence = (program // (BLOCKS * HV)).to(tl.int64)
    slot = sequence  # of the states
    if index_ptr is not None:
        slot = tl.load(index_ptr + sequence).to(tl.int64)
    begin = (sequence * 0).to(tl.int32)
    end = begin + length
    if cu_ptr is not None:
        begin = tl.load(cu_ptr + sequence).to(tl.int32)
        end = tl.load(cu_ptr + sequence + 1).to(tl.int32)

    i = tl.arange(0, ROWS)
    key = tl.arange(0, PADDED_K)
    value = first_value + tl.arange(0, BLOCK_V)
    state_mask = (key < K)[:, None] & (value < tl.where((slot >= 0) & (slot < slots), V, 0))[None, :]
    state = tl.zeros([PADDED_K, BLOCK_V], tl.float32)
    if initial_ptr is not None:
        initial_ptr += slot * initial_slot + head * initial_head
        place = key[:, None].to(tl.int64) * initial_key + value[None, :].to(tl.int64) * initial_value
        known = state_mask
        if has_ptr is not None:
            known &= (key < tl.where(tl.load(has_ptr + sequence) != 0, K, 0))[:, None]
        state = widen(tl.load(initial_ptr + place, mask=known, other=0.0))

    key_head = head // (HV // H)
    q_ptr += begin.to(tl.int64) * q_row + key_head * q_head
    k_ptr += begin.to(tl.int64) * k_row + key_head * k_head
    v_ptr += begin.to(tl.int64) * v_row + head * v_head + first_value
    here = head * length + begin
    t_ptr += here * ROWS
    p_ptr += here * ROWS
    decay_ptr += here * 2
    o_ptr += (begin.to(tl.int64) * HV + head) * V + first_value
    column = tl.arange(0, BLOCK_V)[None, :]
    square = i[:, None] * ROWS + i[None, :]
    far = i[:, None].to(OFFSET)
    step = tl.full([], ROWS, tl.int64)
    for rows in tl.range(end - begin, 0, -ROWS, num_stages=STAGES):  # that are left
        live = (i < rows)[:, None]
        keys = live & (key < COLUMNS)[None, :]
        values = live & (column < V - first_value)
        v = tl.load(v_ptr + (far * v_row + column), mask=values, other=0.0)
        k = load_operand(k_ptr + (far * k_row + key[None, :]), keys)
        q = load_operand(q_ptr + (far * q_row + key[None, :]), keys)
        t = load_operand(t_ptr + square, live)
        p = load_operand(p_ptr + square, live)
        decays = tl.load(decay_ptr + (i[:, None] * 2 + tl.arange(0, 2)[None, :]), mask=live, other=0.0)
        enter, leave = tl.split(decays)  # [ROWS]
        total = tl.load(decay_ptr + (tl.minimum(rows, ROWS) - 1) * 2)

        before = rounded_operand(state, DTYPE)
        new = widen(v) - enter[:, None] * dot(k, before)
        o = enter[:, None] * dot(q, before)
        d = dot(t, rounded_operand(new, DTYPE))
        o = dot(p, rounded_operand(d, DTYPE), o) * scale
        state = dot(tl.trans(k), rounded_operand(d * leave[:, None], DTYPE), state * total)

        tl.store(o_ptr + (i[:, None] * (HV * V) + column), round_to(o, o_ptr.dtype.element_ty), mask=values)
        q_ptr += step * q_row
        k_ptr += step * k_row
        v_ptr += step * v_row
        t_ptr += ROWS * ROWS
        p_ptr += ROWS * ROWS
        decay_ptr += ROWS * 2
        o_ptr += ROWS * HV * V

    if FINAL:
        # No other program reads or writes these elements, and this one has read them.
        tl.debug_barrier()
        final_ptr += slot * final_slot + head * final_head
        place = key[:, None].to(tl.int64) * final_key + value[None, :].to(tl.int64) * final_value
        tl.store(final_ptr + place, round_to(state, final_ptr.dtype.element_ty), mask=state_mask)


_launch_prepare = Launcher(NAME, _prepare)
_launch = Launcher(NAME, _scan)

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tiling(NamedTuple):
    """How both kernels run, whatever the rows and sequences are: no result may depend on those of others."""

    prepare_warps: int
    block_v: int
    warps: int
    stages: int


def _tiling(K: int, V: int, itemsize: int) -> Tiling:
    """What an H200 was fastest with for one sequence and heads of 128: 128 programs scan 32 heads, one for each SM."""
    stages = 3 if K * itemsize <= 256 else 2 if K * itemsize <= 512 else 1  # so that the tiles fit in shared memory
    return Tiling(2 if itemsize == 2 else 4, min(32, max(16, next_power_of_2(V))), 4, stages)


def _operand(x: torch.Tensor) -> torch.Tensor:
    """q or k as `_scan` takes it: 16-bit numbers that do not lie in whole blocks of 16 are copied into such.

    Of others Triton 3.6 made wrong results on an H200, and illegal accesses, with any number of stages.
    """
    step, head, column = x.stride()
    width = x.shape[2]
    fits = step % 16 == head % 16 == width % 16 == 0 and x.data_ptr() % 16 == 0
    if column == 1 and (fits or x.element_size() == 4):
        return x
    if x.element_size() == 2:
        x = torch.nn.functional.pad(x, (0, -width % 16))  # by nothing: a copy with the strides of x
    return x.contiguous()


CHANGES = {0: _operand, 1: _operand, 2: adjacent, **dict.fromkeys((5, 7, 8), contiguous)}


def _plan(inputs: tuple[Any, ...], final: bool, pooled: bool, scale: float | None) -> Plan:
    """How both kernels are launched for a call with q, k, v, g, beta, cu_seqlens, the states, slots and flags.

    The outputs are t, p and the decay of `_prepare`, o, and the last states.
    """
    taken = Taken(inputs, CHANGES)
    q, k, v, g, beta, cu_seqlens, first, _, _ = taken.ready
    (length, key_heads, columns), (_, heads, V), K = q.shape, v.shape, inputs[0].shape[2]
    sequences = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    tiling, dtype, steps = _tiling(K, V, v.element_size()), DTYPES[v.dtype], []
    strides = *q.stride()[:2], *k.stride()[:2]
    if length:
        slots = -(-length // ROWS.value) if cu_seqlens is None else length // ROWS.value + sequences + 2
        prepared = *strides, *g.stride(), *beta.stride(), key_heads, heads, columns, V, dtype
        steps.append(
            Step(
                *(_launch_prepare, (slots * heads, 1, 1), taken, (length, sequences), prepared, tiling.prepare_warps),
                takes=(0, 1, 3, 4, 5),
                gives=range(4),
            )
        )
    far = tl.int64 if max(x.stride(0) for x in (q, k, v)) * ROWS.value >= 2**31 else tl.int32
    state_strides = (0, 0, 0, 0) if first is None else first.stride()
    last_strides = state_strides if pooled else (heads * K * V, K * V, V, 1)
    fixed = *strides, *v.stride()[:2], *state_strides, *last_strides, key_heads, heads, columns, K, V
    numbers = length, len(first) if pooled else sequences, K**-0.5 if scale is None else scale
    fixed = *fixed, tiling.block_v, final or pooled, dtype, far, tiling.stages
    grid = sequences * heads * -(-V // tiling.block_v), 1, 1
    steps.append(Step(_launch, grid, taken, numbers, fixed, tiling.warps, takes=(0, 1, 2, 5, 6, 7, 8)))
    return Plan(taken, *steps)


_plans = Plans(_plan)


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    output_final_state: bool = False,
    state_pool: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns o [L, HV, V], rounded once from fp32, and final_state [F, HV, K, V]. A pool is updated.

    q, k or v is copied first if its last stride is not 1.
    """
    (length, _, K), (_, heads, V) = q.shape, v.shape
    sequences = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    states = sequences if output_final_state else 0
    o, final = new(v.device, ((length, heads, V), v.dtype), ((states, heads, K, V), torch.float32))
    if not o.numel() or not K:
        final.copy_(initial_state) if initial_state is not None and states else final.zero_()
        if state_pool is None or not state_pool.numel():
            return o.zero_(), final
    square = (heads, length, ROWS.value), v.dtype
    t, p, decay = new(v.device, square, square, ((heads, length, 2), torch.float32))
    first, last = (initial_state, final) if state_pool is None else (state_pool, state_pool)
    inputs = q, k, v, g, beta, cu_seqlens, first, state_indices, has_initial_state
    plan, addresses = _plans(inputs, output_final_state, state_pool is not None, scale)
    plan(inputs, addresses, (t, p, decay, o, last))
    return o, final
