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

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from polyfuse.spec import Capability
from polyfuse.triton_impl._common import INTERPRETED, round_to, widen
from polyfuse.triton_impl._launch import Launcher

NAME = "gated_delta_rule"

CAPABILITY = Capability(
    devices=("cuda", "rocm", "xpu", "cpu"),
    ranges={"K": (0, 256)},
    interpreted=("cpu",),
)

ROWS = tl.constexpr(64)  # of a chunk
LEAST_G = tl.constexpr(-120.0)  # exp(-104) is zero in fp32. Sums of it are finite, so that no difference is NaN
# Of products in fp32. Three products in tf32 err as little as one in fp32, and have matrix units on an NVIDIA GPU.
PRECISION = tl.constexpr("ieee" if torch.version.cuda is None else "tf32x3")
SEARCH = tl.constexpr(256)  # entries of cu_seqlens looked at together
NEVER = tl.constexpr(2**31 - 1)  # a slot that does not come


@triton.jit
def _load(ptr, mask):
    """A tile for `tl.dot`, zero outside of the mask."""
    value = tl.load(ptr, mask=mask, other=0.0)
    return widen(value) if INTERPRETED else value  # bf16 arithmetic is wrong in the interpreter


@triton.jit
def _rounded(value, DTYPE: tl.constexpr):
    """fp32 `value` as an operand of a `tl.dot` in DTYPE."""
    rounded = round_to(value, DTYPE)
    return widen(rounded) if INTERPRETED else rounded


@triton.jit
def _dot(a, b, acc=None):
    """a b + acc in fp32."""
    return tl.dot(a, b, acc, input_precision=PRECISION)


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


@triton.jit
def _diagonal(M, B: tl.constexpr, N: tl.constexpr):
    """The blocks [B, N, N] on the diagonal of M [B*N, B*N]."""
    own = tl.arange(0, B)[:, None, None, None] == tl.arange(0, B)[None, None, :, None]
    return tl.sum(tl.where(own, tl.reshape(M, [B, N, B, N]), 0.0), 2)


@triton.jit
def _corners(M):
    """(I + M)^-1 of strictly lower triangular M [B, 16, 16].

    Inverts blocks of 2, 4, 8 rows and so on, each from the inverses of its two halves. No powers of M are summed: they
    can overflow where the inverse is small.
    """
    i = tl.arange(0, 16)[None, :, None]
    j = tl.arange(0, 16)[None, None, :]
    inverse = tl.where(i == j, 1.0, tl.where(i >> 1 == j >> 1, -M, 0.0))
    for level in tl.static_range(1, 4):
        below = tl.where((i >> level + 1 == j >> level + 1) & (i >> level > j >> level), M, 0.0)
        product = _dot(inverse, below)
        inverse -= _dot(product, inverse)
    return inverse


@triton.jit
def _merged(inverse, M, B: tl.constexpr, N: tl.constexpr):
    """The blocks [B, 2*N, 2*N] on the diagonal of (I + M)^-1, from those of half their size."""
    row = tl.arange(0, 2)[None, :, None, None, None]
    column = tl.arange(0, 2)[None, None, None, :, None]
    halves = tl.reshape(inverse, [B, 2, N, N])
    first, second = tl.split(tl.permute(halves, [0, 2, 3, 1]))
    M = tl.reshape(_diagonal(M, B, 2 * N), [B, 2, N, 2, N])
    M = tl.sum(tl.sum(tl.where((row == 1) & (column == 0), M, 0.0), 3), 1)
    if B == 1:  # products of matrices use all warps
        first = tl.reshape(first, [N, N])
        second = tl.reshape(second, [N, N])
        M = tl.reshape(M, [N, N])
    below = _dot(second, M)
    below = -_dot(below, first)
    below = tl.reshape(below, [B, N, N])
    below = tl.where(row > column, below[:, None, :, None, :], 0.0)
    return tl.reshape(tl.where(row == column, halves[:, :, :, None, :], below), [B, 2 * N, 2 * N])


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
        value = tl.arange(0, triton.next_power_of_2(V))[None, :]
        zero = tl.zeros([ROWS, triton.next_power_of_2(V)], o_ptr.dtype.element_ty)
        tl.store(o_ptr + (row * HV + head)[:, None] * V + value, zero, mask=live[:, None] & (value < V))
        return

    key_head = head // (HV // H)
    key = tl.arange(0, triton.next_power_of_2(max(16, K)))[None, :]
    keys = live[:, None] & (key < K)
    q = _load(q_ptr + row[:, None] * q_row + (key_head * q_head + key), keys)
    k = _load(k_ptr + row[:, None] * k_row + (key_head * k_head + key), keys)
    g = tl.load(g_ptr + row * g_row + head * g_head, mask=live, other=0.0)
    beta = tl.load(beta_ptr + row * beta_row + head * beta_head, mask=live, other=0.0)
    G = tl.cumsum(tl.where(g < LEAST_G, LEAST_G, g), 0)  # where keeps NaN
    past = i[:, None] >= i[None, :]
    decay = tl.exp(tl.where(past, G[:, None] - G[None, :], 0.0))
    p = tl.where(past, _dot(q, tl.trans(k)) * decay, 0.0)
    M = tl.where(past & (i[:, None] != i[None, :]), beta[:, None] * _dot(k, tl.trans(k)) * decay, 0.0)
    inverse = _corners(_diagonal(M, 4, 16))
    inverse = _merged(inverse, M, 2, 16)
    inverse = _merged(inverse, M, 1, 32)
    t = tl.reshape(inverse, [ROWS, ROWS]) * beta[None, :]

    here = head * length + row
    tile = here[:, None] * ROWS + i[None, :]
    tl.store(t_ptr + tile, round_to(t, DTYPE), mask=live[:, None])
    tl.store(p_ptr + tile, round_to(p, DTYPE), mask=live[:, None])
    total = tl.sum(tl.where(i == tl.minimum(rows, ROWS) - 1, G, 0.0), 0)
    tl.store(decay_ptr + here * 2, tl.exp(G), mask=live)
    tl.store(decay_ptr + here * 2 + 1, tl.exp(total - G), mask=live)


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
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FINAL: tl.constexpr,
    DTYPE: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Transposed, [BLOCK_V, ...]: state and d are then the first operands of all products, which a GPU reads from
    # registers, where they are. The second operands come from memory, and are fetched ahead.
    BLOCKS: tl.constexpr = triton.cdiv(V, BLOCK_V)
    PADDED_K: tl.constexpr = triton.next_power_of_2(max(16, K))
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
    key = tl.arange(0, PADDED_K)[None, :]
    value = first_value + tl.arange(0, BLOCK_V)
    state_mask = (value[:, None] < tl.where((slot >= 0) & (slot < slots), V, 0)) & (key < K)
    state = tl.zeros([BLOCK_V, PADDED_K], tl.float32)
    if initial_ptr is not None:
        initial_ptr += slot * initial_slot + head * initial_head
        place = value[:, None].to(tl.int64) * initial_value + key.to(tl.int64) * initial_key
        known = state_mask
        if has_ptr is not None:
            known &= key < tl.where(tl.load(has_ptr + sequence) != 0, K, 0)
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
        keys = live & (key < K)
        values = live & (column < V - first_value)
        v = tl.load(v_ptr + (far * v_row + column), mask=values, other=0.0)
        k = _load(k_ptr + (far * k_row + key), keys)
        q = _load(q_ptr + (far * q_row + key), keys)
        t = _load(t_ptr + square, live)
        p = _load(p_ptr + square, live)
        decays = tl.load(decay_ptr + (i[:, None] * 2 + tl.arange(0, 2)[None, :]), mask=live, other=0.0)
        enter, leave = tl.split(decays)  # [ROWS]
        total = tl.load(decay_ptr + (tl.minimum(rows, ROWS) - 1) * 2)

        before = _rounded(state, DTYPE)
        new = widen(tl.trans(v)) - enter[None, :] * _dot(before, tl.trans(k))  # [BLOCK_V, ROWS]
        o = enter[None, :] * _dot(before, tl.trans(q))
        d = _dot(_rounded(new, DTYPE), tl.trans(t))
        o = _dot(_rounded(d, DTYPE), tl.trans(p), o) * scale
        state = _dot(_rounded(d * leave[None, :], DTYPE), k, state * total)

        tl.store(o_ptr + (i[:, None] * (HV * V) + column), tl.trans(round_to(o, o_ptr.dtype.element_ty)), mask=values)
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
        place = value[:, None].to(tl.int64) * final_value + key.to(tl.int64) * final_key
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
    """Not measured yet. A block of 64 columns, of 4 warps, is the least that a Hopper GPU's wgmma takes."""
    stages = 2 if K * itemsize <= 512 else 1  # so that the tiles fit in shared memory
    return Tiling(4, min(64, max(16, triton.next_power_of_2(V))), 4, stages)


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
    (length, key_heads, K), (_, heads, V) = q.shape, v.shape
    sequences = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    states = sequences if output_final_state else 0
    o = v.new_empty(length, heads, V)
    final = torch.empty(states, heads, K, V, dtype=torch.float32, device=v.device)
    if not heads * K * V or not (length or states or state_pool is not None):
        return o.zero_(), final
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    tiling = _tiling(K, V, v.element_size())
    t, p = (v.new_empty(heads, length, ROWS.value) for _ in range(2))
    decay = torch.empty(heads, length, 2, dtype=torch.float32, device=v.device)
    made = t, p, decay
    slots = -(-length // ROWS.value) if cu_seqlens is None else length // ROWS.value + sequences + 2
    dims = key_heads, heads, K, V
    dtype = DTYPES[v.dtype]
    strides = *q.stride()[:2], *k.stride()[:2]
    if length:
        _launch_prepare(
            (slots * heads, 1, 1),
            (q, k, g, beta, cu_seqlens),
            (*made, o),
            (length, sequences),
            (*strides, *g.stride(), *beta.stride(), *dims, dtype),
            tiling.prepare_warps,
        )
    pooled = state_pool is not None
    first, last = (initial_state, final) if state_pool is None else (state_pool, state_pool)
    named = [x if x is None else x.contiguous() for x in (state_indices, has_initial_state)]
    far = tl.int64 if max(q.stride(0), k.stride(0), v.stride(0), heads * V) * ROWS.value >= 2**31 else tl.int32
    state_strides = (0, 0, 0, 0) if first is None else first.stride()
    _launch(
        (sequences * heads * -(-V // tiling.block_v), 1, 1),
        (q, k, v, cu_seqlens, first, *named),
        (*made, o, last),
        (length, len(last) if pooled else sequences, K**-0.5 if scale is None else scale),
        (
            *(*strides, *v.stride()[:2], *state_strides, *last.stride(), *dims, tiling.block_v),
            output_final_state or pooled,
            *(dtype, far, tiling.stages),
        ),
        tiling.warps,
    )
    return o, final
