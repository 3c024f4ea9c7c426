"""The oracle of `gdn_decode`; the formula is the docstring of `polyfuse.spec.gdn_decode`."""

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyfuse.reference._numerics import F64, Array, Exact, to_f64
from polyfuse.reference._oracle import Error, Oracle
from polyfuse.reference.gated_delta_rule import factor
from polyfuse.reference.gated_rms_norm import inverse_rms
from polyfuse.reference.gdn_conv_prep import activated, conv, in_order, normalised, silu
from polyfuse.reference.gdn_post_conv import gate_bounds, inverse_norm, sigmoid, softplus, split_heads
from polyfuse.spec import FP32_TINY, Capability
from polyfuse.spec.gdn_decode import SPEC

CAPABILITY = Capability(devices=("cpu",))

LARGEST_EXPONENT = 128.0  # where float32's exponential is infinite, and sigmoid 0 or 1

Slots = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Token(NamedTuple):
    """One token of each sequence: q, k [B, HV, K, 1], v [B, HV, 1, V], and exp(g), beta [B, HV, 1, 1]."""

    q: F64
    k: F64
    v: F64
    decay: F64
    beta: F64


def formula(
    x: Array,
    z: Array | None,
    a: Array,
    b: Array,
    conv_weight: Array,
    A_log: Array,
    dt_bias: Array,
    norm_weight: Array,
    conv_state: Array,
    recurrent_state: Array,
    *,
    conv_bias: Array | None,
    state_indices: Array | None,
    num_accepted: Array | None,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    interleaved: bool,
    l2norm_eps: float,
    norm_eps: float,
    scale: float | None,
) -> tuple[F64, F64, F64]:
    """out [B, HV*V] or [B, T, HV*V], and both states. What is [L, ...] below has the tokens of all sequences."""
    slots = token_slots(x, state_indices)  # [B, T]
    inputs, gate = parted(x, z, num_k_heads, head_k_dim)
    before = inputs_before(conv_state, slots, num_accepted, conv_weight.shape[1])
    c = conv(windows(before, inputs, slots), conv_weight, conv_bias)
    q, k, v = split_heads(silu(c), num_k_heads, head_k_dim, head_v_dim)
    q, k = q * inverse_norm(q, l2norm_eps), k * inverse_norm(k, l2norm_eps)
    decay, beta = gates(a, b, A_log, dt_bias)
    S = state_before(recurrent_state, slots, state_indices, num_accepted)
    o, states = delta_rule(S, by_token(slots, q, k, v, decay, beta), factor(scale, head_k_dim))
    n = o.reshape(v.shape) * inverse_rms(o.reshape(v.shape), norm_eps)
    out = n * to_f64(norm_weight) * silu(gate.reshape(v.shape))
    out = np.where((slots >= 0).reshape(-1, 1, 1), out, 0.0).reshape(*x.shape[:-1], v.shape[1] * v.shape[2])
    return out, shifted(conv_state, before, inputs, slots, x.ndim == 3)[0], stored(recurrent_state, states, slots)[0]


def token_slots(x: Array, state_indices: Array | None) -> Slots:
    """The slot of each token [B, T], -1 for padding: from the first -1 of a sequence on."""
    batch, tokens = len(x), x.shape[1] if x.ndim == 3 else 1
    slots = np.arange(batch) if state_indices is None else state_indices.astype(np.int64)
    slots = slots.reshape(batch, tokens)
    return np.where(np.logical_and.accumulate(slots >= 0, axis=1), slots, -1)


def parted(x: Array, z: Array | None, heads: int, width: int) -> tuple[F64, F64]:
    """The columns [q | k | v] of x, [L, C], and z, of L * HV * V elements in order."""
    rows = to_f64(x).reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
    if z is not None:
        return rows, to_f64(z)
    key_heads = rows.reshape(len(rows), heads, rows.shape[1] // heads)
    values = key_heads.shape[2] // 2 - width
    gate = key_heads[:, :, key_heads.shape[2] - values :]
    return in_order(rows, heads, width), gate


def inputs_before(state: Array, slots: Slots, num_accepted: Array | None, width: int) -> F64:
    """The width - 1 inputs before each sequence's first token, oldest first: [B, C, W - 1]."""
    before = np.zeros((len(slots), state.shape[1], width - 1))
    for b, slot in enumerate(slots[:, 0]):
        if slot >= 0:
            last = state.shape[2] - (width - 1)
            first = last if num_accepted is None else _last_accepted(num_accepted, b, slots)
            before[b] = to_f64(state[slot, :, first : first + width - 1])
    return before


def windows(before: F64, inputs: F64, slots: Slots) -> F64:
    """What the conv reads for each token, oldest first: [L, C, W]."""
    width, (batch, tokens) = before.shape[2] + 1, slots.shape
    tokens_last = inputs.reshape(batch, tokens, inputs.shape[1]).swapaxes(1, 2)
    both = np.concatenate([before, tokens_last], axis=2)  # [B, C, W - 1 + T]
    window = np.stack([both[:, :, t : t + width] for t in range(tokens)], axis=1)
    return window.reshape(batch * tokens, inputs.shape[1], width)


def gates(a: Array, b: Array, A_log: Array, dt_bias: Array) -> tuple[F64, F64]:
    """exp(g) and beta [L, HV], of an a and b that may have [H, HV / H] in place of HV."""
    x = to_f64(a).reshape(-1, len(A_log)) + to_f64(dt_bias)
    return np.exp(-np.exp(to_f64(A_log)) * softplus(x)), sigmoid(to_f64(b).reshape(-1, len(A_log)))


def by_token(slots: Slots, q: F64, k: F64, v: F64, decay: F64, beta: F64) -> list[Token]:
    """The parts of each token: value head j has key head j // (HV / H)."""
    group = v.shape[1] // q.shape[1]
    q, k = (part.repeat(group, axis=1)[..., None] for part in (q, k))
    parts = (q, k, v[:, :, None], decay[..., None, None], beta[..., None, None])
    batch, tokens = slots.shape
    return [Token(*(part.reshape(batch, tokens, *part.shape[1:])[:, t] for part in parts)) for t in range(tokens)]


def state_before(state: Array, slots: Slots, state_indices: Array | None, num_accepted: Array | None) -> F64:
    """S of each sequence before its first token, 0 where it has no slot: [B, HV, K, V]."""
    S = np.zeros((len(slots), *state.shape[1:]))
    for b, slot in enumerate(slots[:, 0]):
        if slot >= 0 and num_accepted is not None and state_indices is not None:
            slot = state_indices[b, _last_accepted(num_accepted, b, slots)]
        if slot >= 0:
            S[b] = to_f64(state[slot])
    return S


def _last_accepted(num_accepted: Array, sequence: int, slots: Slots) -> int:
    """The number of the last token of a sequence that was accepted, from 0 on."""
    return min(max(int(num_accepted[sequence]), 1), slots.shape[1]) - 1


def delta_rule(S: F64, tokens: list[Token], scale: float) -> tuple[F64, F64]:
    """o [B, T, HV, V], and S after each token [B, T, HV, K, V]."""
    results = []
    for token in tokens:
        o, S = step(S, *token, scale)
        results.append((o[:, :, 0], S))
    return np.stack([o for o, _ in results], axis=1), np.stack([S for _, S in results], axis=1)


def step(S: F64, q: F64, k: F64, v: F64, decay: F64, beta: F64, scale: float) -> tuple[F64, F64]:
    """o [B, HV, 1, V] and the new S of one token."""
    S = decay * S
    d = beta * (v - product(S, k))
    S = S + k * d
    return scale * product(S, q), S


def product(S: F64, vector: F64) -> F64:
    """S^T times a vector [..., K, 1]: [..., 1, V]."""
    return (S * vector).sum(-2, keepdims=True)


def shifted(state: Array, before: F64, inputs: F64, slots: Slots, several: bool) -> tuple[F64, Mask]:
    """The conv state afterwards, and which of its elements are written. `several`: x is [B, T, C]."""
    new, written = to_f64(state), np.zeros(state.shape, np.bool_)
    rows = inputs.reshape(*slots.shape, inputs.shape[1])
    for b, slot in enumerate(slots[:, 0]):
        if slot >= 0:
            tokens = rows[b, slots[b] >= 0].T
            columns = np.concatenate([before[b] if several else to_f64(state[slot]), tokens], axis=1)[:, 1:]
            new[slot, :, : columns.shape[1]] = columns
            written[slot, :, : columns.shape[1]] = True
    return new, written


def stored(state: Array, states: F64, slots: Slots) -> tuple[F64, Mask]:
    """The recurrent state afterwards, and which of its elements are written."""
    new, written = to_f64(state), np.zeros(state.shape, np.bool_)
    for b, t in np.argwhere(slots >= 0):
        new[slots[b, t]] = states[b, t]
        written[slots[b, t]] = True
    return new, written


def bounds(exact: Mapping[str, F64], given: Any, error: Error) -> dict[str, Exact]:
    """The errors of q, k, v, exp(g) and beta, through the delta rule to S and o, and through the norm to out."""
    slots = token_slots(given.x, given.state_indices)
    inputs, gate = parted(given.x, given.z, given.num_k_heads, given.head_k_dim)
    before = inputs_before(given.conv_state, slots, given.num_accepted, given.conv_weight.shape[1])
    q, k, v = _heads(windows(before, inputs, slots), given, error)
    decay, beta = _gates(given, error)
    S = state_before(given.recurrent_state, slots, given.state_indices, given.num_accepted)
    parts = (q, k, v, decay, beta)
    values = by_token(slots, *(part.value for part in parts))
    errors = by_token(slots, *(np.fmax(part.high - part.value, part.value - part.low) for part in parts))
    o, states = _delta_rule(S, values, errors, factor(given.scale, given.head_k_dim), error)
    shape = v.value.shape
    o = Exact(o.value.reshape(shape), o.low.reshape(shape), o.high.reshape(shape))
    out = _gated(o, gate.reshape(shape), given, error)
    live = (slots >= 0).reshape(-1, 1, 1)
    low, high = (np.where(live, end, 0.0).reshape(exact["out"].shape) for end in (out.low, out.high))
    ends, written = zip(*(stored(given.recurrent_state, end, slots) for end in (states.low, states.high)), strict=True)
    copied = shifted(given.conv_state, before, inputs, slots, given.x.ndim == 3)[1]
    same = given.conv_state.dtype == given.x.dtype  # else a NaN's sign may change
    conv_state = replace(Exact.copy(exact["conv_state"], error("conv_state")[0]), bits=same)
    return {
        "out": Exact(exact["out"], low, high),
        "conv_state": _kept(conv_state, ~copied if same else ~copied | ~np.isnan(conv_state.value)),
        "recurrent_state": _kept(Exact(exact["recurrent_state"], *ends), ~written[0]),
    }


def _kept(exact: Exact, kept: Mask) -> Exact:
    """The interval of an updated state, of which these elements stay."""
    low, high = (np.where(kept, exact.value, end) for end in (exact.low, exact.high))
    return Exact(exact.value, low, high, bits=exact.bits, kept=kept)


def _heads(window: F64, given: Any, error: Error) -> tuple[Exact, Exact, Exact]:
    """q, k [L, H, K] and v [L, HV, V] with their intervals."""
    conv = SimpleNamespace(weight=given.conv_weight, bias=given.conv_bias, activation="silu")
    y = activated(window, conv, error)
    ends = [
        split_heads(part, given.num_k_heads, given.head_k_dim, given.head_v_dim) for part in (y.value, y.low, y.high)
    ]
    q, k, v = (Exact(*part) for part in zip(*ends, strict=True))
    relative, flush = error("q, k")
    q, k = (normalised(part, given.l2norm_eps, relative, flush) for part in (q, k))
    return q, k, v


def _gates(given: Any, error: Error) -> tuple[Exact, Exact]:
    """exp(g) and beta [L, HV] with their intervals."""
    decay, beta = gates(given.a, given.b, given.A_log, given.dt_bias)
    a, b = (to_f64(part).reshape(decay.shape) for part in (given.a, given.b))
    b = np.clip(b, -LARGEST_EXPONENT, LARGEST_EXPONENT)
    gate = SimpleNamespace(a=a, b=b, A_log=given.A_log, dt_bias=given.dt_bias, output_g_exp=True)
    found = gate_bounds({"g": decay, "beta": beta}, gate, error)
    return found["g"], found["beta"]


def _delta_rule(S: F64, values: list[Token], errors: list[Token], scale: float, error: Error) -> tuple[Exact, Exact]:
    """o [B, T, HV, V] and S after each token with their intervals, from each token's values and their errors."""
    of_S, results = np.zeros_like(S), []
    for token, of_token in zip(values, errors, strict=True):
        of_o, of_new = _step_errors(S, of_S, token, of_token, scale, error)
        o, S = step(S, *token, scale)
        of_S = np.where(np.isfinite(S), of_new, 0.0)
        results.append((o[:, :, 0], of_o[:, :, 0], S, of_S))
    o, of_o, S, of_S = (np.stack(part, axis=1) for part in zip(*results, strict=True))
    return Exact.around(o, of_o), Exact.around(S, of_S)


def _step_errors(S: F64, of_S: F64, token: Token, of_token: Token, scale: float, error: Error) -> tuple[F64, F64]:
    """The errors of o and of the new S, of an S with an error.

    An error of exp(g) or of d is one for all of S or of a column, and so changes their products with k and q as wholes.
    """
    q, k, v, decay, beta = token
    of_q, of_k, of_v, of_decay, of_beta = of_token
    size_q, size_k, size_S = np.abs(q), np.abs(k), np.abs(S)
    most = decay + of_decay

    relative, flush = error("d")
    difference = v - decay * product(S, k)
    of_difference = of_v + of_decay * np.abs(product(S, k))
    of_difference += most * (product(of_S, size_k + of_k) + product(size_S, of_k))
    of_d = of_beta * np.abs(difference) + (beta + of_beta) * of_difference
    of_d += relative * beta * (np.abs(v) + decay * product(size_S, size_k))
    of_d += flush * (1 + beta * (1 + size_k.sum(-2, keepdims=True)))

    relative, flush = error("recurrent_state")
    d = beta * difference
    size = decay * size_S + size_k * np.abs(d)
    rounded = relative * size + flush * (2 + decay + size_k)
    of_new = of_decay * size_S + most * of_S + size_k * of_d + of_k * (np.abs(d) + of_d) + rounded

    relative, flush = error("o")
    of_o = of_decay * np.abs(product(S, q)) + most * product(of_S, size_q) + product(rounded, size_q)
    of_o += of_d * (np.abs(product(k, q)) + product(of_k, size_q)) + np.abs(d) * product(of_k, size_q)
    of_o += product(np.abs(decay * S + k * d) + of_new, of_q)
    of_o += relative * product(size, size_q) + flush
    return abs(scale) * of_o + flush, of_new


def _gated(o: Exact, gate: F64, given: Any, error: Error) -> Exact:
    """out [L, HV, V] with its interval."""
    weight, act = to_f64(given.norm_weight), silu(gate)
    relative, flush = error("act")
    of_act = relative * np.abs(act) * (1 + np.maximum(-gate, 0)) + flush * (2 + np.abs(gate))
    of_act = np.where(np.isfinite(act) & (act != 0), of_act, flush * (2 + np.abs(gate)))

    relative, flush = error("out")
    n = normalised(o, given.norm_eps, relative, flush, inverse_rms)
    value = n.value * weight * act
    corners = [end * weight * factor for end in (n.low, n.high) for factor in (act - of_act, act + of_act)]
    rest = 1 + np.abs(act) * (1 + np.abs(n.value)) + np.abs(n.value) + np.abs(value) / max(given.norm_eps, FP32_TINY)
    finite = np.isfinite(value)
    low = np.where(finite, np.minimum.reduce(corners) - flush * rest, value)
    return Exact(value, low, np.where(finite, np.maximum.reduce(corners) + flush * rest, value))


gdn_decode = Oracle(SPEC, formula, bounds)
