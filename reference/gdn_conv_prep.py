"""The oracle of `gdn_conv_prep`; the formula is the docstring of `polyfuse.spec.gdn_conv_prep`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfuse.reference._numerics import F64, FP32_MAX, Array, Exact, may_flush, to_f64
from polyfuse.reference._oracle import Error, Oracle
from polyfuse.reference.gdn_post_conv import (
    gate_bounds,
    inverse_norm,
    per_value_head,
    sigmoid,
    softplus,
    split_heads,
)
from polyfuse.spec import Capability
from polyfuse.spec.gdn_conv_prep import SILU_SLOPE, SPEC

CAPABILITY = Capability(devices=("cpu",))

Inverse = Callable[[F64, float], F64]


def formula(
    x: Array,
    weight: Array,
    a: Array,
    b: Array,
    A_log: Array,
    dt_bias: Array,
    *,
    bias: Array | None,
    initial_state: Array | None,
    cu_seqlens: Array | None,
    state_pool: Array | None,
    state_indices: Array | None,
    has_initial_state: Array | None,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool,
    l2norm_eps: float,
    output_g_exp: bool,
    output_final_state: bool,
    interleaved: bool,
    activation: str | None,
) -> tuple[F64, ...]:
    """q, k [L, H, K], v [L, HV, V], g, beta [L, HV], final_state [S, C, W - 1]; and the pool, if there is one."""
    width = weight.shape[1]
    if interleaved:
        x = in_order(x, num_k_heads, head_k_dim)
    state = states_before(x, initial_state, cu_seqlens, state_pool, state_indices, has_initial_state)
    c = conv(windows(x, state, cu_seqlens, width), weight, bias)
    y = silu(c) if activation else c
    q, k, v = split_heads(y, num_k_heads, head_k_dim, head_v_dim)
    if l2norm:
        q, k = q * inverse_norm(q, l2norm_eps), k * inverse_norm(k, l2norm_eps)
    g = -np.exp(to_f64(A_log)) * softplus(per_value_head(a) + to_f64(dt_bias))
    if output_g_exp:
        g = np.exp(g)
    results = q, k, v, g, sigmoid(per_value_head(b))
    if state_pool is not None:
        slots = slots_of(x, cu_seqlens, state_pool, state_indices)
        new = final_state(x, state, cu_seqlens, state_pool.shape[2])
        return *results, new[:0, :, : width - 1], pool_after(state_pool, slots, new)
    last = final_state(x, state, cu_seqlens, width - 1)
    return *results, last if output_final_state else last[:0]


def in_order(x: Array, heads: int, width: int) -> Array:
    """The columns [q | k | v] of rows that are, for each key head, [q | k | v | z] with z as wide as v."""
    columns = np.arange(x.shape[1]).reshape(heads, x.shape[1] // heads)
    end_of_v = (2 * width + columns.shape[1]) // 2
    q, k, v = columns[:, :width], columns[:, width : 2 * width], columns[:, 2 * width : end_of_v]
    return x[:, np.concatenate([q, k, v], axis=None)]


def sequences(length: int, cu_seqlens: Array | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per row the sequence that it is in, -1 before the first one; and where each begins, with the end."""
    if cu_seqlens is None:
        return np.zeros(length, np.int64), np.array([0, length])
    starts = cu_seqlens.astype(np.int64)
    return np.searchsorted(starts, np.arange(length), side="right") - 1, starts


def slots_of(x: Array, cu_seqlens: Array | None, pool: Array, state_indices: Array | None) -> list[int | None]:
    """The slot of the pool that each sequence owns, None for none."""
    _, starts = sequences(len(x), cu_seqlens)
    named = range(len(starts) - 1) if state_indices is None else state_indices.tolist()
    return [slot if 0 <= slot < len(pool) else None for slot in named]


def states_before(
    x: Array,
    initial_state: Array | None,
    cu_seqlens: Array | None,
    pool: Array | None,
    state_indices: Array | None,
    has_initial_state: Array | None,
) -> Array | None:
    """The initial states [S, C, W - 1]; with a pool what is in each sequence's slot [S, C, n], or zeros."""
    if pool is None:
        return initial_state
    slots = slots_of(x, cu_seqlens, pool, state_indices)
    old = np.zeros((len(slots), *pool.shape[1:]))
    for i, slot in enumerate(slots):
        if slot is not None and (has_initial_state is None or has_initial_state[i]):
            old[i] = to_f64(pool[slot])
    return old


def pool_after(pool: Array, slots: list[int | None], new: F64) -> F64:
    """The pool with each sequence's new state in its slot."""
    after = to_f64(pool)
    for i, slot in enumerate(slots):
        if slot is not None:
            after[slot] = new[i]
    return after


def windows(x: Array, state: Array | None, cu_seqlens: Array | None, width: int) -> F64:
    """What the conv reads for each row, oldest first: [L, C, W]. A state may have more columns than it looks back."""
    rows = to_f64(x)
    row, starts = sequences(len(rows), cu_seqlens)
    window = np.zeros((*rows.shape, width))
    for t in range(len(rows)):
        first = starts[row[t]] if row[t] >= 0 else 0
        for j in range(width):
            source = t - (width - 1) + j
            if source >= first:
                window[t, :, j] = rows[source]
            elif state is not None and 0 <= row[t] < len(state):
                window[t, :, j] = to_f64(state[row[t], :, source - first])  # counted from the end: -1 is the newest
    return window


def conv(window: F64, weight: Array, bias: Array | None) -> F64:
    """c [L, C], infinite beyond float32."""
    c = (window * to_f64(weight)).sum(-1) + (0.0 if bias is None else to_f64(bias))
    return np.where(np.abs(c) > FP32_MAX, np.copysign(np.inf, c), c)


def silu(c: F64) -> F64:
    """c * sigmoid(c)."""
    return c * sigmoid(c)


def final_state(x: Array, state: Array | None, cu_seqlens: Array | None, columns: int) -> F64:
    """The last inputs of each sequence, so many, oldest first: [S, C, columns]."""
    rows = to_f64(x)
    _, starts = sequences(len(rows), cu_seqlens)
    states = []
    for i in range(len(starts) - 1):
        before = np.zeros((columns, rows.shape[1])) if state is None else to_f64(state[i]).T
        states.append(np.concatenate([before, rows[starts[i] : starts[i + 1]]])[-columns:].T)
    return np.array(states).reshape(-1, rows.shape[1], columns)


def bounds(exact: Mapping[str, F64], given: Any, error: Error) -> dict[str, Exact]:
    """The error of c, through SiLU to y, and through the norm to q and k."""
    x = in_order(given.x, given.num_k_heads, given.head_k_dim) if given.interleaved else given.x
    pool = given.state_pool, given.state_indices, given.has_initial_state
    state = states_before(x, given.initial_state, given.cu_seqlens, *pool)
    window = windows(x, state, given.cu_seqlens, given.weight.shape[1])
    y = activated(window, given, error)
    parts = [
        split_heads(part, given.num_k_heads, given.head_k_dim, given.head_v_dim) for part in (y.value, y.low, y.high)
    ]
    q, k, v = (Exact(*ends) for ends in zip(*parts, strict=True))
    results = {}
    for name, part in (("q", q), ("k", k)):
        relative, flush = error(name)
        results[name] = normalised(part, given.l2norm_eps, relative, flush) if given.l2norm else part.widened(relative)
    results["v"] = v.widened(error("v")[0])
    results |= gate_bounds(exact, given, error)
    for name, before in (("final_state", given.initial_state), ("state_pool", given.state_pool)):
        if name in exact:
            copy = Exact.copy(exact[name], error(name)[0])
            if before is not None and before.dtype != x.dtype:  # of a NaN another dtype may change the sign
                kept = ~np.isnan(copy.value)
                if name == "state_pool":
                    slots = slots_of(x, given.cu_seqlens, before, given.state_indices)
                    kept[[slot not in slots for slot in range(len(kept))]] = True
                copy = replace(copy, bits=False, kept=kept)
            results[name] = copy
    return results


def activated(window: F64, given: Any, error: Error) -> Exact:
    """y [L, C] with its interval."""
    weight = np.abs(to_f64(given.weight))
    bias = 0.0 if given.bias is None else np.abs(to_f64(given.bias))
    c = conv(window, given.weight, given.bias)
    relative, flush = error("c")
    sizes = np.where(np.isfinite(window), np.abs(window), 0.0)
    of_c = relative * ((np.abs(window) * weight).sum(-1) + bias) + flush * (1 + (weight + sizes).sum(-1))
    result = Exact.around(c, of_c)
    if given.activation:
        y = silu(c)
        relative, flush = error("y")
        of_silu = relative * np.abs(y) * (1 + np.abs(c)) + flush * (1 + np.abs(c))
        result = Exact.around(y, SILU_SLOPE * of_c + of_silu)
    either = np.isinf(window) & may_flush(weight) | may_flush(window) & np.isinf(weight)
    return opened(result, either.any(-1))  # 0 * infinity, or infinity


def normalised(y: Exact, eps: float, relative: float, flush: float, inverse: Inverse = inverse_norm) -> Exact:
    """The interval of y / |y|: each end over the shortest or the longest vector that the others allow.

    `inverse(y, eps)` is 1 / |y|.
    """
    nearest = np.where((y.low <= 0) & (y.high >= 0), 0.0, np.minimum(np.abs(y.low), np.abs(y.high)))
    farthest = np.maximum(np.abs(y.low), np.abs(y.high))
    scale, largest, least = (inverse(part, eps) for part in (y.value, nearest, farthest))
    value = y.value * scale
    error = relative * np.abs(value) + flush * (1 + scale)
    low = np.where(y.low >= 0, y.low * least, y.low * largest) - error
    high = np.where(y.high >= 0, y.high * largest, y.high * least) + error
    finite = np.isfinite(value)
    result = Exact(value, np.where(finite, low, value), np.where(finite, high, value))
    return opened(result, (np.isneginf(y.low) & np.isposinf(y.high)).any(-1, keepdims=True))


def opened(exact: Exact, where: Any) -> Exact:
    """The interval, in which anything is right where that is True."""
    return replace(exact, low=np.where(where, -np.inf, exact.low), high=np.where(where, np.inf, exact.high))


gdn_conv_prep = Oracle(SPEC, formula, bounds)
