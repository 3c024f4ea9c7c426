"""The Triton backend of `gdn_decode`: one launch, in which one program takes a key head of a sequence.

That program owns, in the slots of its sequence, the conv states of the channels of its key head and of the value heads
that belong to it, and the recurrent states of these value heads. No other program reads or writes any element of them.
It reads each before it writes one: a barrier stands in between, because a thread may read what another one writes.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from polyfuse.spec import FP32_TINY, Capability
from polyfuse.triton_impl._common import INTERPRETED, round_to, widen
from polyfuse.triton_impl._gdn import log_decay, sigmoid, silu
from polyfuse.triton_impl._launch import Launcher, Plan, Plans

NAME = "gdn_decode"

CAPABILITY = Capability(devices=("cuda", "rocm", "xpu", "cpu"), interpreted=("cpu",))

TILE = 64  # columns of a recurrent state that a program holds, beside as many that come next
AHEAD = True
WARPS = 4  # with 8 the sums over K cross twice as many


@triton.jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _answers(state, k, q):
    """S^T k and S^T q of a tile [K, BV]."""
    of_k = state * k[:, None]
    of_q = state * q[:, None]
    if INTERPRETED:  # where a reduction of a pair is slow
        return tl.sum(of_k, 0), tl.sum(of_q, 0)
    return tl.reduce((of_k, of_q), 0, _add_pairs)


@triton.jit
def _read(ptr, mask, FULL: tl.constexpr):
    """What is there in fp32, zero outside of the mask. With FULL the mask is true everywhere."""
    if FULL:
        return widen(tl.load(ptr))
    return widen(tl.load(ptr, mask=mask, other=0.0))


@triton.jit
def _conv(conv, column, channel, mask, token, W: tl.constexpr):
    """SiLU of the conv of some channels, which are these columns of x, at one token."""
    x_ptr, x_token = conv[0]
    state_ptr, state_channel, state_column, begin = conv[1]
    weight_ptr, weight_channel, weight_tap, bias_ptr = conv[2]
    y = tl.zeros(channel.shape, tl.float32)
    if bias_ptr is not None:
        y = widen(tl.load(bias_ptr + channel, mask=mask, other=0.0))
    state_ptr += channel.to(tl.int64) * state_channel
    weight_ptr += channel * weight_channel
    for lag in tl.static_range(W):
        at = channel * 0 + token - lag
        value = widen(tl.load(x_ptr + column + at * x_token, mask=mask & (at >= 0), other=0.0))
        if lag > 0:
            kept = tl.load(state_ptr + (begin + W - 1 + at) * state_column, mask=mask & (at < 0), other=0.0)
            value = tl.where(at < 0, widen(kept), value)
        y = tl.fma(widen(tl.load(weight_ptr + (W - 1 - lag) * weight_tap, mask=mask, other=0.0)), value, y)
    return silu(y)


@triton.jit
def _conv_now(conv, column, channel, mask, W: tl.constexpr, FULL: tl.constexpr):
    """`_conv` of the one token that there is."""
    x_ptr, _ = conv[0]
    state_ptr, state_channel, state_column, begin = conv[1]
    weight_ptr, weight_channel, weight_tap, bias_ptr = conv[2]
    y = tl.zeros(channel.shape, tl.float32)
    if bias_ptr is not None:
        y = _read(bias_ptr + channel, mask, FULL)
    state_ptr += channel.to(tl.int64) * state_channel
    weight_ptr += channel * weight_channel
    y = tl.fma(_read(weight_ptr + (W - 1) * weight_tap, mask, FULL), _read(x_ptr + column, mask, FULL), y)
    for lag in tl.static_range(1, W):
        at = W - 1 - lag
        weight = _read(weight_ptr + at * weight_tap, mask, FULL)
        y = tl.fma(weight, _read(state_ptr + (begin + at) * state_column, mask, FULL), y)
    return silu(y)


@triton.jit
def _keys(conv, columns, channels, mask, token, eps, W: tl.constexpr):
    """q and k at one token: what the conv gives, each divided by its length."""
    q = _conv(conv, columns[0], channels[0], mask, token, W)
    k = _conv(conv, columns[1], channels[1], mask, token, W)
    return q * tl.rsqrt(tl.sum(q * q, 0) + eps), k * tl.rsqrt(tl.sum(k * k, 0) + eps)


@triton.jit
def _gates(gates, value_head, g, token):
    """The decay and beta of value head g of the key head at one token."""
    a_ptr, a_token, a_column, b_ptr, b_token, b_column, A_log_ptr, dt_bias_ptr = gates
    a = widen(tl.load(a_ptr + g * a_column + token * a_token)) + widen(tl.load(dt_bias_ptr + value_head))
    decay = tl.exp(log_decay(a, widen(tl.load(A_log_ptr + value_head))))
    return decay, sigmoid(widen(tl.load(b_ptr + g * b_column + token * b_token)))


@triton.jit
def _tile(state_ptr, conv, key_mask, values, gates, strides, g: tl.constexpr, block: tl.constexpr, sizes: tl.constexpr):
    """A tile of the state of value head g, and v, decay and beta of its columns at the one token."""
    V: tl.constexpr = sizes[0]
    W: tl.constexpr = sizes[1]
    BV: tl.constexpr = sizes[2]
    FULL: tl.constexpr = sizes[3]
    lane = block * BV + tl.arange(0, BV)
    at = state_ptr + g * strides[0] + lane.to(tl.int64)[None, :] * strides[1]
    state = _read(at, key_mask[:, None] & (lane < V)[None, :], FULL)
    v = _conv_now(conv, values[0] + g * V + lane, values[1] + g * V + lane, lane < V, W, FULL)
    decay, beta = _gates(gates, values[3] + g, g, 0)
    return state, v, decay, beta


@triton.jit
def _write(state_ptr, state, mask):
    """Writes a tile of a recurrent state once all threads have read what it overwrites."""
    tl.debug_barrier()
    tl.store(state_ptr, round_to(state, state_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _factor(norm, lane, column, token, V: tl.constexpr):
    """What the normalised output of a value head is multiplied with: the weight, and SiLU of the gate."""
    z_ptr, z_token, norm_ptr = norm
    gate = widen(tl.load(z_ptr + column + lane + token * z_token, mask=lane < V, other=0.0))
    return widen(tl.load(norm_ptr + lane, mask=lane < V, other=0.0)) * silu(gate)


@triton.jit
def _normalised(o, eps, V: tl.constexpr):
    """A value head's output [BLOCKS, BV], divided by its root mean square."""
    return o * tl.rsqrt(tl.sum(tl.sum(o * o, 1), 0) / V + eps)


@triton.jit
def _shifted(conv, column, channel, mask, shift, T: tl.constexpr, N: tl.constexpr):
    """What the conv states of some channels become: their columns behind number `shift`, and the tokens."""
    x_ptr, x_token = conv[0]
    state_ptr, state_channel, state_column, _ = conv[1]
    place = tl.arange(0, triton.next_power_of_2(N))[None, :]
    token = place - (N - T)
    mask = mask[:, None] & (place < N)
    state_ptr += channel.to(tl.int64)[:, None] * state_channel
    old = tl.load(state_ptr + (place + 1 + shift) * state_column, mask=mask & (token < 0), other=0.0)
    new = tl.load(x_ptr + column[:, None] + token * x_token, mask=mask & (token >= 0), other=0.0)
    return tl.where(token < 0, widen(old), widen(new))


@triton.jit
def _store_shifted(conv, value, channel, mask, tokens, T: tl.constexpr, N: tl.constexpr):
    """Writes what `_shifted` gives, but for the columns of padding: so many `tokens` are none."""
    state_ptr, state_channel, state_column, _ = conv[1]
    place = tl.arange(0, triton.next_power_of_2(N))[None, :]
    mask = mask[:, None] & (place - (N - T) < tokens)
    state_ptr += channel.to(tl.int64)[:, None] * state_channel
    tl.store(state_ptr + place * state_column, round_to(value, state_ptr.dtype.element_ty), mask=mask & (place < N))


@triton.jit
def _one_token(
    out_ptr,  # [G, V]
    state_ptr,  # [K, 1], of the first value head
    conv,
    keys,  # columns, channels and mask of q and k
    values,  # the first column and channel of v, the first column of z, the first value head
    gates,
    norm,
    strides,  # of the state, from value head to value head and from column to column
    scale,
    l2norm_eps,
    norm_eps,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    BV: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """All value heads of a key head, tile by tile: of each all is loaded before the one before it is written."""
    BLOCKS: tl.constexpr = triton.cdiv(V, BV)
    FULL: tl.constexpr = triton.next_power_of_2(K) == K and V % BV == 0
    sizes: tl.constexpr = (V, W, BV, FULL)
    columns, channels, key_mask = keys
    state, v, decay, beta = _tile(state_ptr, conv, key_mask, values, gates, strides, 0, 0, sizes)
    number = tl.arange(0, BLOCKS)[:, None]
    lanes = number * BV + tl.arange(0, BV)[None, :]  # BLOCKS is a power of two
    factor = _factor(norm, lanes, values[2], 0, V)
    q = _conv_now(conv, columns[0], channels[0], key_mask, W, FULL)
    k = _conv_now(conv, columns[1], channels[1], key_mask, W, FULL)
    q *= tl.rsqrt(tl.sum(q * q, 0) + l2norm_eps)
    k *= tl.rsqrt(tl.sum(k * k, 0) + l2norm_eps)
    qk = tl.sum(q * k, 0)
    o = tl.zeros([BLOCKS, BV], tl.float32)
    for i in tl.static_range(G * BLOCKS):
        of_k, of_q = _answers(state, k, q)
        delta = beta * (v - decay * of_k)
        part = scale * (decay * of_q + delta * qk)
        new = decay * state + k[:, None] * delta[None, :]
        o = tl.where(number == i % BLOCKS, part[None, :], o)
        if AHEAD and i + 1 < G * BLOCKS:
            state, v, decay, beta = _tile(
                state_ptr, conv, key_mask, values, gates, strides, (i + 1) // BLOCKS, (i + 1) % BLOCKS, sizes
            )
        lane = i % BLOCKS * BV + tl.arange(0, BV)
        at = state_ptr + i // BLOCKS * strides[0] + lane.to(tl.int64)[None, :] * strides[1]
        _write(at, new, key_mask[:, None] & (lane < V)[None, :])
        if i % BLOCKS == BLOCKS - 1:
            y = round_to(_normalised(o, norm_eps, V) * factor, out_ptr.dtype.element_ty)
            if i + 1 < G * BLOCKS:
                factor = _factor(norm, lanes, values[2] + (i + 1) // BLOCKS * V, 0, V)
            tl.store(out_ptr + i // BLOCKS * V + lanes, y, mask=lanes < V)
        if not AHEAD and i + 1 < G * BLOCKS:
            state, v, decay, beta = _tile(
                state_ptr, conv, key_mask, values, gates, strides, (i + 1) // BLOCKS, (i + 1) % BLOCKS, sizes
            )


@triton.jit
def _several_tokens(
    out_ptr,  # [T, HV, V], at the first value head
    state_ptr,  # [slots, 1, K, 1], at the first value head
    slots,  # where recurrent states are read, where those of the tokens are written, and the stride of a slot
    tokens,  # that are no padding
    conv,
    keys,
    values,
    gates,
    norm,
    strides,
    scale,
    l2norm_eps,
    norm_eps,
    T: tl.constexpr,
    HV: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
):
    """All value heads of a key head, one after the other: each goes through the tokens with its state in registers."""
    source, index_ptr, index_token, state_slot = slots
    lane = tl.arange(0, triton.next_power_of_2(V))
    mask = keys[2][:, None] & (lane < V)[None, :]
    readable = (lane < tl.where(source >= 0, V, 0))[None, :]
    for g in tl.static_range(G):
        at = state_ptr + g * strides[0] + lane.to(tl.int64)[None, :] * strides[1]
        state = widen(tl.load(at + source * state_slot, mask=mask & readable, other=0.0))
        for token in range(T):
            q, k = _keys(conv, keys[0], keys[1], keys[2], token, l2norm_eps, W)
            v = _conv(conv, values[0] + g * V + lane, values[1] + g * V + lane, lane < V, token, W)
            decay, beta = _gates(gates, values[3] + g, g, token)
            of_k, of_q = _answers(state, k, q)
            delta = beta * (v - decay * of_k)
            o = scale * (decay * of_q + delta * tl.sum(q * k, 0))
            if token < tokens:
                target = tl.load(index_ptr + token * index_token).to(tl.int64)
                state = decay * state + k[:, None] * delta[None, :]
                _write(at + target * state_slot, state, mask)
            y = _normalised(o[None, :], norm_eps, V) * _factor(norm, lane[None, :], values[2] + g * V, token, V)
            y = round_to(tl.where(token < tokens, y, 0.0), out_ptr.dtype.element_ty)
            tl.store(out_ptr + (token * HV + g) * V + lane[None, :], y, mask=(lane < V)[None, :])


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
    BV: tl.constexpr,
    AHEAD: tl.constexpr,
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
        output = tl.arange(0, triton.next_power_of_2(G * V))
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
        lane = tl.arange(0, triton.next_power_of_2(K))
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
        strides = (state_head, state_column)
        heads_ptr = state_ptr + value_head.to(tl.int64) * state_head + lane.to(tl.int64)[:, None] * state_key
        value_lane = tl.arange(0, triton.next_power_of_2(G * V))
        value_mask = value_lane < G * V
        q_new = _shifted(conv, q_column, q_channel, lane < K, shift, T, N)
        k_new = _shifted(conv, k_column, k_channel, lane < K, shift, T, N)
        v_new = _shifted(conv, v_column + value_lane, v_channel + value_lane, value_mask, shift, T, N)
        tokens = T
        if T == 1:
            at = heads_ptr + slot * state_slot
            _one_token(
                out_ptr,
                at,
                conv,
                keys,
                values,
                gates,
                norm,
                strides,
                scale,
                l2norm_eps,
                norm_eps,
                G,
                K,
                V,
                W,
                BV,
                AHEAD,
            )
        else:
            place = tl.arange(0, triton.next_power_of_2(T))
            index = tl.load(index_ptr + place * index_token, mask=place < T, other=-1)
            tokens = tl.min(tl.where(index < 0, place, T), 0)
            slots = (source, index_ptr, index_token, state_slot)
            _several_tokens(
                out_ptr,
                heads_ptr,
                slots,
                tokens,
                conv,
                keys,
                values,
                gates,
                norm,
                strides,
                scale,
                l2norm_eps,
                norm_eps,
                T,
                HV,
                G,
                V,
                W,
            )
        tl.debug_barrier()
        _store_shifted(conv, q_new, q_channel, lane < K, tokens, T, N)
        _store_shifted(conv, k_new, k_channel, lane < K, tokens, T, N)
        _store_shifted(conv, v_new, v_channel + value_lane, value_mask, tokens, T, N)


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
    out = torch.empty((*x.shape[:-1], len(A_log) * head_v_dim), dtype=x.dtype, device=x.device)
    if out.numel():
        inputs = (
            *(x, z, a, b, conv_weight, A_log, dt_bias, norm_weight, conv_state, recurrent_state),
            *(conv_bias, state_indices, num_accepted),
        )
        _plans(inputs, num_k_heads, head_k_dim, head_v_dim, l2norm_eps, norm_eps, scale)(inputs, out)
    return out


def _plan(
    inputs: tuple[Any, ...], H: int, K: int, V: int, l2norm_eps: float, norm_eps: float, scale: float | None
) -> Plan:
    """How a call with these inputs, in the order of the kernel's parameters, is launched."""
    x, z, a, b, conv_weight, A_log, _, _, conv_state, recurrent_state, _, state_indices, _ = inputs
    lead, HV = x.shape[:-1], A_log.shape[0]
    x, z = (part if part is None or part.stride(-1) == 1 else part.contiguous() for part in (x, z))
    contiguous = [i for i, part in enumerate(inputs[:2]) if part is not None and part.stride(-1) != 1]
    *gate_strides, group = _gate_layout(a, b, lead, H, HV)
    eps = max(l2norm_eps, FP32_TINY)  # a zero vector must give zero
    numbers = K**-0.5 if scale is None else scale, eps, norm_eps
    fixed = (
        *_steps(x, lead),
        *((0, 0) if z is None else _steps(z, lead)),
        *gate_strides,
        *conv_weight.stride(),
        *((0, 0) if state_indices is None else _steps(state_indices, lead)),
        *conv_state.stride(),
        *recurrent_state.stride(),
        *(group, lead[1] if len(lead) == 2 else 1, H, K, HV, V, conv_weight.shape[1], conv_state.shape[2]),
        *(min(TILE, triton.next_power_of_2(V)), AHEAD),
    )
    grid = lead[0] * H, 1, 1
    return Plan(_launch, grid, inputs, numbers, fixed, WARPS, (*contiguous, *VECTORS))


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
