"""The Triton backend of `gated_delta_rule`: two launches, which work on chunks of 64 rows of a sequence.

With G the sum of g from the beginning of the chunk, S the state before it, and d = beta * (v - S^T k) as in the spec:

    M[i, j] = beta[i] * (k[i] . k[j]) * exp(G[i] - G[j]) for j < i, else 0
    d       = (I + M)^-1 (beta * v) - (I + M)^-1 (beta * exp(G) * k) S
    o       = scale * (exp(G) * (q S) + P d)        P[i, j] = (q[i] . k[j]) * exp(G[i] - G[j]) for j <= i, else 0
    S       = exp(G[last]) * S + k^T (exp(G[last] - G) * d)

`_prepare` computes all that needs no state, each chunk on its own: the two factors of d, `u` and `-w`; P; and the
exponentials. `_scan` walks from chunk to chunk of a sequence, a block of the value's columns at a time.
"""

import torch
import triton
import triton.language as tl

from polyfuse.spec import Capability
from polyfuse.triton_impl._common import INTERPRETED, round_to, widen
from polyfuse.triton_impl._launch import Launcher

NAME = "gated_delta_rule"

CAPABILITY = Capability(
    devices=("cuda", "rocm", "xpu", "cpu"),
    ranges={"K": (1, 256), "V": (1, 65536)},
    interpreted=("cpu",),
)

ROWS = tl.constexpr(64)  # of a chunk
LEAST_G = tl.constexpr(-120.0)  # exp(-104) is zero in fp32. Sums of it are finite, so that no difference is NaN
SEARCH = tl.constexpr(256)  # entries of cu_seqlens looked at together
NEVER = tl.constexpr(2**31 - 1)  # a slot that does not come


@triton.jit
def _load(ptr, mask, ZERO: tl.constexpr = 0.0):
    """A tile for `tl.dot`, zero outside of the mask."""
    value = tl.load(ptr, mask=mask, other=ZERO)
    return widen(value) if INTERPRETED else value  # bf16 arithmetic is wrong in the interpreter


@triton.jit
def _rounded(value, DTYPE: tl.constexpr):
    """fp32 `value` as an operand of a `tl.dot` in DTYPE."""
    rounded = round_to(value, DTYPE)
    return widen(rounded) if INTERPRETED else rounded


@triton.jit
def _dot(a, b, acc=None):
    """a b + acc in fp32. Operands in fp32 are not rounded to tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _place(cu_ptr, sequences, length, slot):
    """The sequence of a slot, and the row that its chunk begins with and the one that its sequence ends before.

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
def _inverse(M, PRECISION: tl.constexpr):
    """(I + M)^-1 of a strictly lower triangular M [ROWS, ROWS].

    Inverts diagonal blocks of 2, 4, 8 rows and so on, each from the inverses of its two halves. No powers of M are
    summed: they can overflow where the inverse is small.
    """
    i = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, ROWS)[None, :]
    inverse = tl.where(i == j, 1.0, 0.0) - tl.where(i // 2 == j // 2, M, 0.0)
    for level in tl.static_range(1, 6):
        HALF: tl.constexpr = 2**level
        below = tl.where((i // (2 * HALF) == j // (2 * HALF)) & (i // HALF > j // HALF), M, 0.0)
        product = tl.dot(inverse, below, input_precision=PRECISION)
        inverse -= tl.dot(product, inverse, input_precision=PRECISION)
    return inverse


@triton.jit(do_not_specialize=["length", "sequences"])
def _prepare(
    q_ptr,  # [length, H, K]
    k_ptr,  # [length, H, K]
    v_ptr,  # [length, HV, V]
    g_ptr,  # [length, HV]
    beta_ptr,  # [length, HV]
    cu_ptr,  # [sequences + 1] or None
    w_ptr,  # [HV, length, K]: -w
    u_ptr,  # [HV, length, V]
    p_ptr,  # [HV, length, ROWS]
    enter_ptr,  # [HV, length]: exp(G)
    leave_ptr,  # [HV, length]: exp(G[last] - G)
    o_ptr,  # [length, HV, V]: zero in rows outside of all sequences
    length,
    sequences,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    g_row,
    g_head,
    beta_row,
    beta_head,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_V: tl.constexpr,
    HEADS: tl.constexpr,  # value heads of a program, all of one key head
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCKS: tl.constexpr = HV // HEADS
    program = tl.program_id(0)
    first_head = program % BLOCKS * HEADS
    slot = program // BLOCKS
    sequence = slot * 0
    begin = slot * ROWS
    end = sequence + length
    if cu_ptr is not None:
        sequence, begin, end = _place(cu_ptr, sequences, length, slot)
    if begin >= end:
        return

    i = tl.arange(0, ROWS)
    row = begin + i.to(tl.int64)
    live = row < end
    key = tl.arange(0, PADDED_K)[None, :]
    value = tl.arange(0, PADDED_V)[None, :]
    keys = live[:, None] & (key < K)
    values = live[:, None] & (value < V)
    if (sequence < 0) | (sequence >= tl.maximum(sequences, 1)):
        zero = tl.zeros([ROWS, PADDED_V], o_ptr.dtype.element_ty)
        for part in range(HEADS):
            tl.store(o_ptr + (row * HV + first_head + part)[:, None] * V + value, zero, mask=values)
        return

    key_head = (first_head // (HV // H)).to(tl.int64)
    q = _load(q_ptr + row[:, None] * q_row + (key_head * q_head + key), keys)
    k = _load(k_ptr + row[:, None] * k_row + (key_head * k_head + key), keys)
    qk = _dot(q, tl.trans(k))  # [ROWS, ROWS]
    kk = _dot(k, tl.trans(k))
    same = i[:, None] == i[None, :]
    past = i[:, None] >= i[None, :]
    last = tl.minimum(end - begin, ROWS) - 1
    for part in range(HEADS):
        at = (first_head + part).to(tl.int64)
        g = tl.load(g_ptr + row * g_row + at * g_head, mask=live, other=0.0)
        beta = tl.load(beta_ptr + row * beta_row + at * beta_head, mask=live, other=0.0)
        v = _load(v_ptr + row[:, None] * v_row + (at * v_head + value), values)
        G = tl.cumsum(tl.where(g < LEAST_G, LEAST_G, g), 0)  # where keeps NaN
        enter = tl.exp(G)
        decay = tl.exp(tl.where(past, G[:, None] - G[None, :], 0.0))
        p = tl.where(past, qk * decay, 0.0)
        inverse = _inverse(tl.where(past & ~same, beta[:, None] * kk * decay, 0.0), PRECISION)
        inverse *= beta[None, :]
        u = _dot(_rounded(inverse, DTYPE), v)
        w = _dot(_rounded(inverse * -enter[None, :], DTYPE), k)

        here = at * length + row
        tl.store(u_ptr + here[:, None] * V + value, round_to(u, DTYPE), mask=values)
        tl.store(w_ptr + here[:, None] * K + key, round_to(w, DTYPE), mask=keys)
        tl.store(p_ptr + here[:, None] * ROWS + i[None, :], round_to(p, DTYPE), mask=live[:, None])
        tl.store(enter_ptr + here, enter, mask=live)
        tl.store(leave_ptr + here, tl.exp(tl.sum(tl.where(i == last, G, 0.0), 0) - G), mask=live)


@triton.jit(do_not_specialize=["length"])
def _scan(
    q_ptr,  # [length, H, K]
    k_ptr,  # [length, H, K]
    cu_ptr,  # [sequences + 1] or None
    initial_ptr,  # [sequences, HV, K, V] or None
    w_ptr,  # as in _prepare
    u_ptr,
    p_ptr,
    enter_ptr,
    leave_ptr,
    o_ptr,  # [length, HV, V]
    final_ptr,  # [sequences, HV, K, V], written if FINAL
    length,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
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
    PADDED_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FINAL: tl.constexpr,
    DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Transposed, [BLOCK_V, ...]: the state and d are then the first operands of all products, which a GPU reads from
    # registers, where they are. The second operands come from memory, and are fetched ahead.
    BLOCKS: tl.constexpr = triton.cdiv(V, BLOCK_V)
    program = tl.program_id(0)
    first_value = program % BLOCKS * BLOCK_V
    head = (program // BLOCKS % HV).to(tl.int64)
    slot = (program // (BLOCKS * HV)).to(tl.int64)  # of the states
    begin = (slot * 0).to(tl.int32)
    end = begin + length
    if cu_ptr is not None:
        begin = tl.load(cu_ptr + slot).to(tl.int32)
        end = tl.load(cu_ptr + slot + 1).to(tl.int32)

    i = tl.arange(0, ROWS)
    key = tl.arange(0, PADDED_K)[None, :]
    value = first_value + tl.arange(0, BLOCK_V)
    state_mask = (value[:, None] < V) & (key < K)
    state = tl.zeros([BLOCK_V, PADDED_K], tl.float32)
    if initial_ptr is not None:
        initial_ptr += slot * initial_slot + head * initial_head
        place = value[:, None].to(tl.int64) * initial_value + key.to(tl.int64) * initial_key
        state = widen(tl.load(initial_ptr + place, mask=state_mask, other=0.0))

    key_head = head // (HV // H)
    q_ptr += begin.to(tl.int64) * q_row + key_head * q_head
    k_ptr += begin.to(tl.int64) * k_row + key_head * k_head
    here = head * length + begin
    w_ptr += here * K
    u_ptr += here * V + first_value
    p_ptr += here * ROWS
    enter_ptr += here
    leave_ptr += here
    o_ptr += (begin.to(tl.int64) * HV + head) * V + first_value
    q_tile = i[:, None].to(tl.int64) * q_row + key
    k_tile = i[:, None].to(tl.int64) * k_row + key
    column = tl.arange(0, BLOCK_V)[None, :]
    for rows in tl.range(end - begin, 0, -ROWS, num_stages=STAGES):  # that are left
        live = (i < rows)[:, None]
        keys = live & (key < K)
        values = live & (column < V - first_value)
        u = tl.load(u_ptr + (i[:, None] * V + column), mask=values, other=0.0)
        w = _load(w_ptr + (i[:, None] * K + key), keys)
        q = _load(q_ptr + q_tile, keys)
        k = _load(k_ptr + k_tile, keys)
        p = _load(p_ptr + (i[:, None] * ROWS + i[None, :]), live)
        enter = tl.load(enter_ptr + i, mask=i < rows, other=0.0)
        leave = tl.load(leave_ptr + i, mask=i < rows, other=0.0)
        decay = tl.load(enter_ptr + tl.minimum(rows, ROWS) - 1)

        before = _rounded(state, DTYPE)
        d = _dot(before, tl.trans(w), widen(tl.trans(u)))  # [BLOCK_V, ROWS]
        o = _dot(before, tl.trans(q)) * enter[None, :]
        o = _dot(_rounded(d, DTYPE), tl.trans(p), o) * scale
        state = _dot(_rounded(d * leave[None, :], DTYPE), k, state * decay)

        tl.store(o_ptr + (i[:, None] * (HV * V) + column), tl.trans(round_to(o, o_ptr.dtype.element_ty)), mask=values)
        q_ptr += ROWS * q_row
        k_ptr += ROWS * k_row
        w_ptr += ROWS * K
        u_ptr += ROWS * V
        p_ptr += ROWS * ROWS
        enter_ptr += ROWS
        leave_ptr += ROWS
        o_ptr += ROWS * HV * V

    if FINAL:
        final_ptr += slot * final_slot + head * final_head
        place = value[:, None].to(tl.int64) * final_value + key.to(tl.int64) * final_key
        tl.store(final_ptr + place, round_to(state, final_ptr.dtype.element_ty), mask=state_mask)


_launch_prepare = Launcher(NAME, _prepare)
_launch = Launcher(NAME, _scan)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _tile(group: int, V: int) -> tuple[int, int, int, int, int]:
    """Value heads and warps of a program of `_prepare`; columns of the value, warps and stages of one of `_scan`.

    None of it depends on how many rows or sequences there are, and so no result does.
    """
    return group, 4, min(64, max(16, triton.next_power_of_2(V))), 4, 3


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns o [L, HV, V], rounded once from fp32, and final_state [F, HV, K, V].

    q, k or v is copied first if its last stride is not 1.
    """
    (length, key_heads, K), (_, heads, V) = q.shape, v.shape
    sequences = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    o = v.new_empty(v.shape)
    final = torch.empty(
        (sequences if output_final_state else 0, heads, K, V), dtype=torch.float32, device=v.device
    )
    if not o.numel():
        final.copy_(initial_state) if initial_state is not None and len(final) else final.zero_()
        return o, final
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    part, warps, block_v, scan_warps, stages = _tile(heads // key_heads, V)
    padded_k, padded_v = (max(16, triton.next_power_of_2(size)) for size in (K, V))
    w, u, p = (v.new_empty(heads, length, columns) for columns in (K, V, ROWS.value))
    enter, leave = (torch.empty(heads, length, dtype=torch.float32, device=v.device) for _ in range(2))
    made = w, u, p, enter, leave
    slots = -(-length // ROWS.value) if cu_seqlens is None else length // ROWS.value + sequences + 2
    dims = key_heads, heads, K, V, padded_k
    dtype = DTYPES[v.dtype]
    strides = *q.stride()[:2], *k.stride()[:2]
    _launch_prepare(
        (slots * (heads // part), 1, 1),
        (q, k, v, g, beta, cu_seqlens),
        (*made, o),
        (length, sequences),
        (
            *(*strides, *v.stride()[:2], *g.stride(), *beta.stride(), *dims, padded_v, part, dtype),
            "ieee" if v.dtype == torch.float32 else "tf32x3",
        ),
        warps,
    )
    states = (0,) * 4 if initial_state is None else initial_state.stride()
    _launch(
        (sequences * heads * -(-V // block_v), 1, 1),
        (q, k, cu_seqlens, initial_state),
        (*made, o, final),
        (length, K**-0.5 if scale is None else scale),
        (*strides, *states, *final.stride(), *dims, block_v, output_final_state, dtype, stages),
        scan_warps,
    )
    return o, final
