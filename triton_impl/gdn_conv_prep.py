"""The Triton backend of `gdn_conv_prep`: one launch for all six outputs, and another one to write a pool.

The first programs compute the gates, the next ones the final states. Each of the others walks down a strip of rows with
some heads of q, k or v, and keeps the rows that the conv looks back at in registers.
"""

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl

from polyfuse._torch.memory import allocator
from polyfuse.spec import FP32_TINY
from polyfuse.triton_impl._common import capability, cdiv, next_power_of_2, round_to, widen
from polyfuse.triton_impl._conv_state import begin_window, store_final_state, update_pool
from polyfuse.triton_impl._conv_weights import as_one_number, read_weights
from polyfuse.triton_impl._gdn import gate_layout, gate_tile, l2_normalise, new_outputs, silu
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl._plans import Change, Plan, Plans, Step, Taken, adjacent, contiguous

NAME = "gdn_conv_prep"

CAPABILITY = capability()

STEP = tl.constexpr(4)  # rows that a strip takes at a time: that many loads are under way
SHORT = 512  # up to this many rows programs are small, so that there are many
STRIPS = 640  # a long call has about so many: each begins with reading its weights and the rows before it
COLUMNS = (512, 1024)  # per program of single rows, of strips: whole pages of a row, 16 bytes for each of 128 threads
GATES = (128, 512)  # g and beta per program of a short, a long call
STAGES = tl.constexpr(3)
SEARCH = tl.constexpr(256)  # entries of cu_seqlens looked at together
NEVER = tl.constexpr(2**31 - 1)  # a row that does not come


@triton.jit
def _place(cu_ptr, sequences, length, row):
    """The sequence that a row is in, its first row and that of the next; -1 or `sequences` for a row outside of all."""
    sequence = (row.to(tl.int64) * sequences // length).to(tl.int32)  # where all are of one length
    begin = tl.load(cu_ptr + sequence).to(tl.int32)
    end = tl.load(cu_ptr + sequence + 1).to(tl.int32)
    if (row < begin) | (row >= end):
        sequence = -1
        begin = 0
        end = NEVER
        for first in range(0, sequences + 1, SEARCH):
            entry = first + tl.arange(0, SEARCH)
            at = tl.load(cu_ptr + entry, mask=entry <= sequences, other=NEVER).to(tl.int32)
            passed = at <= row
            sequence += tl.sum(passed.to(tl.int32), 0)
            begin = tl.maximum(begin, tl.max(tl.where(passed, at, 0), 0))
            end = tl.minimum(end, tl.min(tl.where(passed, NEVER, at), 0))
    return sequence, begin, end


@triton.jit
def _input(x_ptr, rows, x_row, mask):
    """The inputs of the row that is `rows` after the one of `x_ptr`, a tile over channels."""
    return tl.load(x_ptr + rows.to(tl.int64) * x_row, mask=mask, other=0.0)


@triton.jit
def _write(out_ptr, window, weights, bias, mask, eps, W: tl.constexpr, NORMALISE: tl.constexpr, ACTIVATE: tl.constexpr):
    """Stores one row's outputs, made from the inputs in its window. As in the weights, the row's own comes first."""
    y = tl.fma(weights[0], window[0], bias)
    y = tl.fma(weights[1], window[1], y)
    if W > 2:
        y = tl.fma(weights[2], window[2], y)
    if W > 3:
        y = tl.fma(weights[3], window[3], y)
    if ACTIVATE:
        y = silu(y)
    if NORMALISE:
        y = l2_normalise(y, eps)
    tl.store(out_ptr, round_to(y, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _strip(
    conv,  # pointers and strides, as `_kernel` groups them
    span,  # the strip's first row and number of rows, the call's number of rows and sequences
    out_ptr,  # [length, COUNT, WIDTH]
    first_head,
    first_column,
    first_place,
    eps,
    KEY_HEAD: tl.constexpr,
    GROUP: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    NORMALISE: tl.constexpr,
    ACTIVATE: tl.constexpr,
    W: tl.constexpr,
):
    """Computes a strip of HEADS heads of the q, k or v whose channels begin at `first_column`.

    The channels are the columns of x, unless KEY_HEAD says that those of a key head lie together and how many they are:
    then `first_place` is where the GROUP heads that belong to it begin among them.
    """
    x_ptr, weight_ptr, bias_ptr, cu_ptr, x_row, weight_channel, weight_tap, states = conv
    row, rows, length, sequences = span
    PADDED: tl.constexpr = next_power_of_2(WIDTH)
    lane = tl.zeros([1, HEADS, PADDED], tl.int32) + tl.arange(0, PADDED)[None, None, :]
    mask = lane < WIDTH
    column = (first_head + tl.arange(0, HEADS))[None, :, None] * WIDTH + lane  # [1, HEADS, PADDED], as all tiles here
    channel = (first_column + column).to(tl.int64)
    weights = read_weights(weight_ptr + channel * weight_channel, mask, weight_tap, W, x_ptr.dtype.element_ty)
    if KEY_HEAD:
        head = first_head + tl.arange(0, HEADS)
        place = head // GROUP * KEY_HEAD + first_place + head % GROUP * WIDTH
        x_ptr += (place[None, :, None] + lane).to(tl.int64) + row.to(tl.int64) * x_row
    else:
        x_ptr += channel + row.to(tl.int64) * x_row
    out_ptr += column + row.to(tl.int64) * (COUNT * WIDTH)
    x1 = widen(_input(x_ptr, -tl.minimum(row, 1), x_row, mask))
    x2 = widen(_input(x_ptr, -tl.minimum(row, 2), x_row, mask))
    x3 = widen(_input(x_ptr, -tl.minimum(row, 3), x_row, mask))
    bias = tl.zeros([1, HEADS, PADDED], tl.float32)
    if bias_ptr is not None:
        bias = widen(tl.load(bias_ptr + channel, mask=mask, other=0.0))
    sequence = row * 0
    begin = sequence
    end = sequence + NEVER
    if cu_ptr is not None:
        sequence, begin, end = _place(cu_ptr, sequences, length, row)
    stop = tl.minimum(length, row + rows)
    for first in tl.range(row, stop, STEP, num_stages=STAGES):
        last = stop - 1 - first
        step = (
            _input(x_ptr, tl.minimum(last, 0), x_row, mask),
            _input(x_ptr, tl.minimum(last, 1), x_row, mask),
            _input(x_ptr, tl.minimum(last, 2), x_row, mask),
            _input(x_ptr, tl.minimum(last, 3), x_row, mask),
        )
        if (first - begin >= W - 1) & (first + STEP <= tl.minimum(end, stop)):
            for j in tl.static_range(STEP):
                x = widen(step[j])
                target = out_ptr + j * (COUNT * WIDTH)
                _write(target, (x, x1, x2, x3), weights, bias, mask, eps, W, NORMALISE, ACTIVATE)
                x3 = x2
                x2 = x1
                x1 = x
        else:
            now = stop - 1 - last  # `first`, as the interpreter's kind of number
            source = x_ptr
            target = out_ptr
            for _ in range(tl.minimum(STEP, stop - first)):
                if cu_ptr is not None:
                    while now >= end:
                        sequence += 1
                        begin = end
                        end = NEVER
                        if sequence < sequences:
                            end = tl.load(cu_ptr + sequence + 1).to(tl.int32)
                age = now - begin
                if age < W - 1:
                    x1, x2, x3 = begin_window(x1, x2, x3, states, sequence, sequences, channel, lane, age, WIDTH, W)
                x = widen(tl.load(source, mask=mask, other=0.0))
                _write(target, (x, x1, x2, x3), weights, bias, mask, eps, W, NORMALISE, ACTIVATE)
                x3 = x2
                x2 = x1
                x1 = x
                source += x_row
                target += COUNT * WIDTH
                now += 1
        x_ptr += STEP * x_row
        out_ptr += STEP * COUNT * WIDTH


@triton.jit(do_not_specialize=["length", "sequences", "states", "slots", "rows"])
def _kernel(
    x_ptr,  # [length, C], C = 2*H*K + HV*V; or [length, H * (2*K + 2*HV/H*V)]
    weight_ptr,  # [C, W]
    a_ptr,  # [length, HV / GROUP, GROUP]
    b_ptr,  # [length, HV / GROUP, GROUP]
    A_log_ptr,  # [HV]
    dt_bias_ptr,  # [HV]
    bias_ptr,  # [C] or None
    state_ptr,  # [sequences, C, W - 1], or of a pool [slots, C, W - 1], or None
    slots_ptr,  # [sequences] for a pool, or None
    valid_ptr,  # [sequences] for a pool, or None
    cu_ptr,  # [sequences + 1] or None
    q_ptr,  # [length, H, K]
    k_ptr,  # [length, H, K]
    v_ptr,  # [length, HV, V]
    g_ptr,  # [length, HV]
    beta_ptr,  # [length, HV]
    final_ptr,  # [states, W - 1, C]
    length,
    sequences,
    states,
    slots,
    rows,
    eps,
    x_row,
    weight_channel,
    weight_tap,
    state_slot,
    state_channel,
    state_tap,
    a_row,
    a_group,
    a_column,
    b_row,
    b_group,
    b_column,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    HV: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    L2NORM: tl.constexpr,
    G_EXP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_V: tl.constexpr,
    GATE_TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    C: tl.constexpr = 2 * H * K + HV * V
    QK_BLOCKS: tl.constexpr = H // HEADS
    BLOCKS: tl.constexpr = 2 * QK_BLOCKS + HV // HEADS_V
    VALUE_HEADS: tl.constexpr = max(1, HV // H)  # of a key head
    KEY_HEAD: tl.constexpr = 2 * K + 2 * (HV // H) * V if INTERLEAVED else 0
    STATE_BLOCKS: tl.constexpr = cdiv(C, CHANNELS)
    before = (state_ptr, state_slot, state_channel, state_tap, (slots_ptr, valid_ptr, slots))
    conv = (x_ptr, weight_ptr, bias_ptr, cu_ptr, x_row, weight_channel, weight_tap, before)
    gates = (a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, g_ptr, beta_ptr)
    gate_strides = (a_row, a_group, a_column, b_row, b_group, b_column)
    program = tl.program_id(0)
    gate_programs = tl.cdiv(length, GATE_TOKENS)
    state_programs = states * STATE_BLOCKS
    if program < gate_programs:
        gate_tile(gates, gate_strides, program, length, GROUP, HV, GATE_TOKENS, G_EXP)
    elif program < gate_programs + state_programs:
        program -= gate_programs
        sequence = program // STATE_BLOCKS
        channels = program % STATE_BLOCKS
        store_final_state(conv, final_ptr, length, sequence, channels, KEY_HEAD, H, K, VALUE_HEADS * V, C, W, CHANNELS)
    else:
        program -= gate_programs + state_programs
        span = (program // BLOCKS * rows, rows, length, sequences)
        block = program % BLOCKS
        if block < 2 * QK_BLOCKS:
            part = block // QK_BLOCKS  # 0: q, 1: k
            out_ptr = q_ptr
            if part == 1:
                out_ptr = k_ptr
            head = block % QK_BLOCKS * HEADS
            first, place = part * (H * K), part * K
            _strip(conv, span, out_ptr, head, first, place, eps, KEY_HEAD, 1, H, K, HEADS, L2NORM, ACTIVATE, W)
        else:
            head = (block - 2 * QK_BLOCKS) * HEADS_V
            first, place = 2 * H * K, 2 * K
            _strip(
                conv, span, v_ptr, head, first, place, eps, KEY_HEAD, VALUE_HEADS, HV, V, HEADS_V, False, ACTIVATE, W
            )


_launch = Launcher(NAME, _kernel)


def _tile(length: int, sequences: int, H: int, K: int, HV: int, V: int) -> tuple[int, int, int, int, int]:
    """The rows of a strip; and of a program, its heads of q and k, heads of v, tokens of gates, channels of states."""
    step = STEP.value
    single = length < step * sequences  # most rows are among the first of their sequence
    rows = 1 if single else step * max(1 + (length > SHORT), length // (step * STRIPS))
    columns = COLUMNS[not single]
    heads = gcd(H, max(1, columns // next_power_of_2(K)))
    heads_v = gcd(HV, max(1, columns // next_power_of_2(V)))
    gate_tokens = max(1, GATES[length > SHORT] // next_power_of_2(HV or 1))
    return rows, heads, heads_v, gate_tokens, columns


STATES = 7  # the place of the states, or the pool, among the inputs
PART = 11  # that of the part of the pool which is read


def _as_bytes(flags: torch.Tensor) -> torch.Tensor:
    return flags.contiguous().view(torch.uint8)


def _rows_first(state: torch.Tensor) -> torch.Tensor:
    """The states, in the layout of rows of x."""
    return state if state.stride(1) == 1 else state.transpose(1, 2).contiguous().transpose(1, 2)


def _columns_from(first: int) -> Change:
    return lambda pool: pool[:, :, first:]


def _plan(
    inputs: tuple[Any, ...],
    H: int,
    K: int,
    V: int,
    l2norm: bool,
    l2norm_eps: float,
    g_exp: bool,
    final: bool,
    interleaved: bool,
    activate: bool,
    pooled: bool,
) -> Plan:
    """How a call with these inputs, in the order of the kernel's parameters, is launched.

    If `pooled`, there is a pool in the place of the states.
    """
    x, weight, _, _, A_log, _, _, states, _, _, cu_seqlens = inputs
    length, HV = x.shape[0], A_log.shape[0]
    (channels, width), sequences = weight.shape, 1 if cu_seqlens is None else len(cu_seqlens) - 1
    finals, dims = sequences if final else 0, (H, K, HV, V)
    rows, *tile = _tile(length, sequences, *dims) if length else (1,)
    changes: dict[int, Change] = {0: adjacent, **dict.fromkeys((4, 5, 6, 8, 10), contiguous), 9: _as_bytes}
    if width == 4 and weight.dtype == x.dtype and weight.element_size() == 2:
        changes[1] = as_one_number
    if rows > 1 and not pooled:  # a strip has the layout of rows
        changes[STATES] = _rows_first
    taken, steps = Taken(inputs, changes, [(STATES, _columns_from(states.shape[2] - width + 1))] if pooled else []), []
    if length:
        takes = *range(STATES), PART if pooled else STATES, *range(STATES + 1, PART)
        x, weight, a, b, _, _, _, before, *_ = taken.at(takes)
        heads, heads_v, gate_tokens, state_channels = tile
        blocks = 2 * (H // heads) + HV // heads_v
        programs = -(-length // gate_tokens) + finals * -(-channels // state_channels) + -(-length // rows) * blocks
        state_strides = (0, 0, 0) if before is None else before.stride()
        strides = x.stride(0), *weight.stride(), *state_strides, *gate_layout(a, b, H, HV)
        fixed = *strides, *dims, width, l2norm, g_exp, interleaved, activate, *tile
        eps = max(l2norm_eps, FP32_TINY)  # a zero vector must give zero
        numbers = length, sequences, finals, len(states) if pooled else 0, rows, eps
        steps.append(Step(_launch, (programs, 1, 1), taken, numbers, fixed, warps=4, takes=takes))
    if pooled:
        steps.append(update_pool(taken, (0, STATES, 8, 9, 10), dims, interleaved))
    return Plan(taken, *steps)


_plans = Plans(_plan)


def gdn_conv_prep(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    state_pool: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool = True,
    l2norm_eps: float = 1e-6,
    output_g_exp: bool = False,
    output_final_state: bool = False,
    interleaved: bool = False,
    activation: str | None = "silu",
) -> tuple[torch.Tensor, ...]:
    """Returns q, k, v, g and beta, each rounded once, and final_state. Writes the pool."""
    length, (channels, width) = x.shape[0], weight.shape
    states = 0 if not output_final_state else 1 if cu_seqlens is None else len(cu_seqlens) - 1
    outputs = new_outputs(x, length, A_log.shape[0], num_k_heads, head_k_dim, head_v_dim)
    state_dtype = x.dtype if initial_state is None else initial_state.dtype
    taps = width - 1
    final_state = allocator(x.device)((states, channels, taps), (taps * channels, 1, channels), state_dtype)
    results = *outputs, final_state
    if length or state_pool is not None:
        inputs = (
            *(x, weight, a, b, A_log, dt_bias, bias, initial_state if state_pool is None else state_pool),
            *(state_indices, has_initial_state, cu_seqlens),
        )
        plan, addresses = _plans(
            *(inputs, num_k_heads, head_k_dim, head_v_dim, l2norm, l2norm_eps, output_g_exp, output_final_state),
            *(interleaved, activation is not None, state_pool is not None),
        )
        plan(inputs, addresses, results)
    if states and not length:
        final_state.copy_(initial_state) if initial_state is not None else final_state.zero_()
    return results
