"""The Triton backend of `gdn_decode`: one launch, in which one program takes a key head of a sequence.

That program owns, in the slots of its sequence, the conv states of the channels of its key head and of the value heads
that belong to it, and the recurrent states of these value heads. No other program reads or writes any element of them.
It reads each before it writes one: a barrier stands in between, because a thread may read what another one writes.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from polyfuse._torch.memory import new
from polyfuse.spec import FP32_TINY
from polyfuse.triton_impl._common import INTERPRETED, capability, next_power_of_2, product, round_to, widen
from polyfuse.triton_impl._conv_step import conv_at, read, shifted, store_shifted
from polyfuse.triton_impl._gdn import log_decay, sigmoid, silu
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl._plans import Plan, Plans, Step, Taken, adjacent, contiguous

NAME = "gdn_decode"

CAPABILITY = capability()

WARPS = 4  # with 8 the sums over K cross twice as many
HALVED_WARPS = 2
LEAST_HALVED = 32  # columns of a value head
MOST_SPREAD = tl.constexpr(4096)  # elements of a state of which a thread may have a single one of a column


@triton.jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _answers(state, k, q):
    """S^T k and S^T q of a state [K, V]."""
    if state.shape[0] * state.shape[1] > MOST_SPREAD:
        of_k = state * k[:, None]
        of_q = state * q[:, None]
    else:
        of_k = product(state, k[:, None])
        of_q = product(state, q[:, None])
    if INTERPRETED:  # where a reduction of a pair is slow
        return tl.sum(of_k, 0), tl.sum(of_q, 0)
    return tl.reduce((of_k, of_q), 0, _add_pairs)


@triton.jit
def _keys(conv, keys, token, eps, sizes: tl.constexpr):
    """q and k at one token: what the conv gives, each divided by its length."""
    columns, channels, mask = keys
    q = conv_at(conv, columns[0], channels[0], mask, token, sizes)
    k = conv_at(conv, columns[1], channels[1], mask, token, sizes)
    return q * tl.rsqrt(tl.sum(product(q, q), 0) + eps), k * tl.rsqrt(tl.sum(product(k, k), 0) + eps)


@triton.jit
def _gates(gates, value_head, g, token):
    """The decay and beta of value head g of the key head at one token."""
    a_ptr, a_token, a_column, b_ptr, b_token, b_column, A_log_ptr, dt_bias_ptr = gates
    a = widen(tl.load(a_ptr + g * a_column + token * a_token)) + widen(tl.load(dt_bias_ptr + value_head))
    decay = tl.exp(log_decay(a, widen(tl.load(A_log_ptr + value_head))))
    return decay, sigmoid(widen(tl.load(b_ptr + g * b_column + token * b_token)))


@triton.jit
def _factor(norm, lane, column, token, V: tl.constexpr):
    """What the normalised output of a value head is multiplied with: the weight, and SiLU of the gate."""
    z_ptr, z_token, norm_ptr = norm
    gate = widen(tl.load(z_ptr + column + lane + token * z_token, mask=lane < V, other=0.0))
    return widen(tl.load(norm_ptr + lane, mask=lane < V, other=0.0)) * silu(gate)


@triton.jit
def _value_heads(
    out_ptr,  # [T, HV, V], at the first value head
    state_ptr,  # [slots, HV, K, 1], at the first value head
    slots,  # the sequence's, that from which the recurrent states are read; those that the tokens' states are put into
    tokens,  # that are no padding
    conv,
    keys,  # columns, channels and mask of q and k
    values,  # the first column and channel of v, the first column of z, the first value head
    gates,
    norm,
    strides,  # of the recurrent state, from slot to slot, from value head to value head, from column to column
    numbers,
    G: tl.constexpr,
    HV: tl.constexpr,
    V: tl.constexpr,
    sizes: tl.constexpr,  # T, W, and whether K and V fill the tiles
):
    """All value heads of a key head, one after the other: each goes through the tokens with its state in registers."""
    T: tl.constexpr = sizes[0]
    slot, source, index_ptr, index_token = slots
    state_slot, state_head, state_column = strides
    scale, l2norm_eps, norm_eps = numbers
    lane = tl.arange(0, next_power_of_2(V))
    known = lane < V
    mask = keys[2][:, None] & known[None, :]
    readable = keys[2][:, None] & (lane < tl.where(source >= 0, V, 0))[None, :]
    q, k = _keys(conv, keys, tokens * 0, l2norm_eps, sizes)
    for g in tl.static_range(G):
        at = state_ptr + g * state_head + lane.to(tl.int64)[None, :] * state_column
        state = read(at + source * state_slot, readable, sizes[2] and T == 1)
        for token in range(T):
            target = slot
            if T > 1:
                target = tl.load(index_ptr + token * index_token).to(tl.int64)
                q, k = _keys(conv, keys, token, l2norm_eps, sizes)
            v = conv_at(conv, values[0] + g * V + lane, values[1] + g * V + lane, known, token, sizes)
            decay, beta = _gates(gates, values[3] + g, g, token)
            factor = _factor(norm, lane, values[2] + g * V, token, V)
            of_k, of_q = _answers(state, k, q)
            delta = beta * (v - decay * of_k)
            o = scale * (decay * of_q + delta * tl.sum(product(q, k), 0))
            if token < tokens:
                state = decay * state + k[:, None] * delta[None, :]
                tl.debug_barrier()  # all threads have read what is written here
                tl.store(at + target * state_slot, round_to(state, state_ptr.dtype.element_ty), mask=mask)
            y = tl.where(token < tokens, o * tl.rsqrt(tl.sum(product(o, o), 0) / V + norm_eps) * factor, 0.0)
            tl.store(out_ptr + (token * HV + g) * V + lane, round_to(y, out_ptr.dtype.element_ty), mask=known)


@triton.jit
def _half(at, state, mask, k, q, qk, v, decay, beta, scale):
    """The output of half of the columns of a value head, whose new state is stored."""
    of_k, of_q = _answers(state, k, q)
    delta = beta * (v - decay * of_k)
    state = decay * state + k[:, None] * delta[None, :]
    tl.debug_barrier()  # all threads have read what is written here
    tl.store(at, round_to(state, at.dtype.element_ty), mask=mask)
    return scale * (decay * of_q + delta * qk)


@triton.jit
def _halved_value_heads(
    out_ptr, state_ptr, slots, tokens, conv, keys, values, gates, norm, strides, numbers, G: tl.constexpr,
    HV: tl.constexpr, V: tl.constexpr, sizes: tl.constexpr,
):  # fmt: skip
    """As `_value_heads` at a single token, but with half of the columns of a state in registers at a time."""
    slot, source, _, _ = slots
    state_slot, state_head, state_column = strides
    scale, l2norm_eps, norm_eps = numbers
    HALF: tl.constexpr = next_power_of_2(V) // 2
    FULL: tl.constexpr = sizes[2]
    lane = tl.arange(0, HALF)
    later = lane + HALF
    known = later < V  # of the later half; all of the first one is
    mask = keys[2][:, None] & (lane < HALF)[None, :]
    later_mask = keys[2][:, None] & known[None, :]
    readable = keys[2][:, None] & (lane < tl.where(source >= 0, V, 0))[None, :]
    later_readable = keys[2][:, None] & (later < tl.where(source >= 0, V, 0))[None, :]
    at = state_ptr + lane.to(tl.int64)[None, :] * state_column
    state = read(at + source * state_slot, readable, FULL)
    token = tokens * 0
    q, k = _keys(conv, keys, token, l2norm_eps, sizes)
    qk = tl.sum(product(q, k), 0)
    for g in tl.static_range(G):
        column = values[0] + g * V + lane
        channel = values[1] + g * V + lane
        v = conv_at(conv, column, channel, lane < HALF, token, sizes)
        later_v = conv_at(conv, column + HALF, channel + HALF, known, token, sizes)
        decay, beta = _gates(gates, values[3] + g, g, token)
        if g > 0:
            state = read(at + source * state_slot, readable, FULL)
        o = _half(at + slot * state_slot, state, mask, k, q, qk, v, decay, beta, scale)
        later_at = at + HALF * state_column
        state = read(later_at + source * state_slot, later_readable, FULL)
        later_o = _half(later_at + slot * state_slot, state, later_mask, k, q, qk, later_v, decay, beta, scale)
        squares = tl.sum(product(o, o), 0) + tl.sum(product(later_o, later_o), 0)
        inverse = tl.rsqrt(squares / V + norm_eps)
        y = o * inverse * _factor(norm, lane, values[2] + g * V, token, V)
        later_y = later_o * inverse * _factor(norm, later, values[2] + g * V, token, V)
        tl.store(out_ptr + g * V + lane, round_to(y, out_ptr.dtype.element_ty))
        tl.store(out_ptr + g * V + later, round_to(later_y, out_ptr.dtype.element_ty), mask=known)
        at += state_head


@triton.jit
def _kernel(
    x_ptr,  # [B, T, C], C = 2*H*K + HV*V; or [B, T, H * (2*K + 2*G*V)], G = HV/H
    z_ptr,  # [B, T, HV*V]; None where it is in x
    a_ptr,  # [B, T, HV / GROUP, GROUP]
    b_ptr,  # [B, T, HV / GROUP, GROUP]
    weight_ptr,  # [2*H*K + HV*V, W]
    A_log_ptr,  # [HV]
    dt_bias_ptr,  # [HV]
    norm_ptr,  # [V]
    conv_ptr,  # [slots, 2*H*K + HV*V, N]
    state_ptr,  # [slots, HV, K, V]
    bias_ptr,  # [2*H*K + HV*V] or None
    index_ptr,  # [B, T] or None
    accepted_ptr,  # [B] or None
    out_ptr,  # [B, T, HV, V]
    scale,
    l2norm_eps,
    norm_eps,
    x_row: tl.constexpr,
    x_token: tl.constexpr,
    z_row: tl.constexpr,
    z_token: tl.constexpr,
    a_row: tl.constexpr,
    a_token: tl.constexpr,
    a_group: tl.constexpr,
    a_column: tl.constexpr,
    b_row: tl.constexpr,
    b_token: tl.constexpr,
    b_group: tl.constexpr,
    b_column: tl.constexpr,
    weight_channel: tl.constexpr,
    weight_tap: tl.constexpr,
    index_row: tl.constexpr,
    index_token: tl.constexpr,
    conv_slot: tl.constexpr,
    conv_channel: tl.constexpr,
    conv_column: tl.constexpr,
    state_slot: tl.constexpr,
    state_head: tl.constexpr,
    state_key: tl.constexpr,
    state_column: tl.constexpr,
    GROUP: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    HV: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    HALVED: tl.constexpr,
):
    G: tl.constexpr = HV // H
    row = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    value_head = head * G
    out_ptr += (row * T * HV + value_head) * V
    slot = row
    if index_ptr is not None:
        index_ptr += row * index_row
        slot = tl.load(index_ptr).to(tl.int64)
    if slot < 0:
        output = tl.arange(0, next_power_of_2(G * V))
        for token in range(T):
            zeros = tl.zeros(output.shape, out_ptr.dtype.element_ty)
            tl.store(out_ptr + token * HV * V + output, zeros, mask=output < G * V)
    else:
        begin = slot.to(tl.int32) * 0 + (N - (W - 1))  # of the columns that the first token's conv reads
        shift = begin * 0 + (T - 1)
        source = slot  # of the recurrent state
        if accepted_ptr is not None:
            shift = tl.load(accepted_ptr + row).to(tl.int32) - 1
            begin = shift
            source = tl.load(index_ptr + shift * index_token).to(tl.int64)
        x_ptr += row * x_row
        conv_ptr += slot * conv_slot
        state = (conv_ptr, conv_channel, conv_column, begin)
        conv = ((x_ptr, x_token), state, (weight_ptr, weight_channel, weight_tap, bias_ptr))
        lane = tl.arange(0, next_power_of_2(K))
        q_channel = head * K + lane
        k_channel = H * K + q_channel
        v_channel = 2 * H * K + value_head * V
        if z_ptr is None:  # key heads of [q | k | v | z]
            q_column = head * (2 * K + 2 * G * V) + lane
            k_column = q_column + K
            v_column = head * (2 * K + 2 * G * V) + 2 * K
            z_column = v_column + G * V
            norm = (x_ptr, x_token, norm_ptr)
        else:
            q_column = q_channel
            k_column = k_channel
            v_column = v_channel
            z_column = value_head * V
            norm = (z_ptr + row * z_row, z_token, norm_ptr)
        keys = ((q_column, k_column), (q_channel, k_channel), lane < K)
        values = (v_column, v_channel, z_column, value_head)
        a_ptr += row * a_row
        b_ptr += row * b_row
        if GROUP == HV:
            a_ptr += value_head * a_column
            b_ptr += value_head * b_column
        else:
            a_ptr += head * a_group
            b_ptr += head * b_group
        gates = (a_ptr, a_token, a_column, b_ptr, b_token, b_column, A_log_ptr, dt_bias_ptr)
        strides = (state_slot, state_head, state_column)
        heads_ptr = state_ptr + value_head.to(tl.int64) * state_head + lane.to(tl.int64)[:, None] * state_key
        value_lane = tl.arange(0, next_power_of_2(G * V))
        value_mask = value_lane < G * V
        q_new = shifted(conv, q_column, q_channel, lane < K, shift, T, N)
        k_new = shifted(conv, k_column, k_channel, lane < K, shift, T, N)
        v_new = shifted(conv, v_column + value_lane, v_channel + value_lane, value_mask, shift, T, N)
        tokens = shift * 0 + T
        if T > 1:
            place = tl.arange(0, next_power_of_2(T))
            index = tl.load(index_ptr + place * index_token, mask=place < T, other=-1)
            tokens = tl.min(tl.where(index < 0, place, T), 0)
        slots = (slot, source, index_ptr, index_token)
        numbers = (scale, l2norm_eps, norm_eps)
        arguments = (out_ptr, heads_ptr, slots, tokens, conv, keys, values, gates, norm, strides, numbers)
        full: tl.constexpr = next_power_of_2(K) == K and next_power_of_2(V) == V
        if HALVED:
            _halved_value_heads(*arguments, G, HV, V, (T, W, full))
        else:
            _value_heads(*arguments, G, HV, V, (T, W, full))
        tl.debug_barrier()
        store_shifted(conv, q_new, q_channel, lane < K, tokens, T, N)
        store_shifted(conv, k_new, k_channel, lane < K, tokens, T, N)
        store_shifted(conv, v_new, v_channel + value_lane, value_mask, tokens, T, N)


_launch = Launcher(NAME, _kernel)
VECTORS = 5, 6, 7, 10, 12  # the places of A_log, dt_bias, norm_weight, conv_bias and num_accepted


def gdn_decode(
    x: torch.Tensor,
    z: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    conv_state: torch.Tensor,
    recurrent_state: torch.Tensor,
    *,
    conv_bias: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    num_accepted: torch.Tensor | None = None,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    interleaved: bool = False,
    l2norm_eps: float = 1e-6,
    norm_eps: float = 1e-6,
    scale: float | None = None,
) -> torch.Tensor:
    """Returns out, rounded once; both states are updated."""
    (out,) = new(x.device, ((*x.shape[:-1], A_log.shape[0] * head_v_dim), x.dtype))
    if out.numel():
        inputs = (
            *(x, z, a, b, conv_weight, A_log, dt_bias, norm_weight, conv_state, recurrent_state),
            *(conv_bias, state_indices, num_accepted),
        )
        plan, addresses = _plans(inputs, num_k_heads, head_k_dim, head_v_dim, l2norm_eps, norm_eps, scale)
        plan(inputs, addresses, (out,))
    return out


def _plan(
    inputs: tuple[Any, ...], H: int, K: int, V: int, l2norm_eps: float, norm_eps: float, scale: float | None
) -> Plan:
    """How a call with these inputs, in the order of the kernel's parameters, is launched."""
    taken = Taken(inputs, {0: adjacent, 1: adjacent, **dict.fromkeys(VECTORS, contiguous)})
    x, z, a, b, conv_weight, A_log, _, _, conv_state, recurrent_state, _, state_indices, _ = taken.ready
    lead, HV = x.shape[:-1], A_log.shape[0]
    *gate_strides, group = _gate_layout(a, b, lead, H, HV)
    eps = max(l2norm_eps, FP32_TINY), max(norm_eps, FP32_TINY)  # a zero vector must give zero
    numbers = K**-0.5 if scale is None else scale, *eps
    tokens = lead[1] if len(lead) == 2 else 1
    halved = tokens == 1 and recurrent_state.itemsize == 2 and V >= LEAST_HALVED
    fixed = (
        *_steps(x, lead),
        *((0, 0) if z is None else _steps(z, lead)),
        *gate_strides,
        *conv_weight.stride(),
        *((0, 0) if state_indices is None else _steps(state_indices, lead)),
        *conv_state.stride(),
        *recurrent_state.stride(),
        *(group, tokens, H, K, HV, V, conv_weight.shape[1], conv_state.shape[2], halved),
    )
    return Plan(taken, Step(_launch, (lead[0] * H, 1, 1), taken, numbers, fixed, HALVED_WARPS if halved else WARPS))


_plans = Plans(_plan)


def _steps(tensor: torch.Tensor, lead: torch.Size) -> tuple[int, int]:
    """The strides of sequences and tokens."""
    strides = tensor.stride()
    return strides[0], strides[1] if len(lead) == 2 else 0


def _gate_layout(a: torch.Tensor, b: torch.Tensor, lead: torch.Size, H: int, HV: int) -> tuple[int, ...]:
    """The strides of a, then of b, each [B, T, HV / GROUP, GROUP]; and that GROUP: HV where neither is split."""
    dims, group = len(lead) + 1, HV
    if a.ndim > dims or b.ndim > dims:
        a, b = (gate.unflatten(-1, (H, HV // H)) if gate.ndim == dims else gate for gate in (a, b))
        group = HV // H
    layouts: list[int] = []
    for gate in (a, b):
        strides = gate.stride()
        layouts += *_steps(gate, lead), 1 if group == HV else strides[-2], strides[-1]
    return *layouts, group
