"""The oracle of `gdn_conv_prep`; the formula is the docstring of `polyfuse.spec.gdn_conv_prep`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfuse.reference._numerics import F64, Exact, round_to, to_f64
from polyfuse.reference.gdn_post_conv import gates, sigmoid
from polyfuse.spec import FP32_ROUNDOFF, FP32_TINY, Capability, dtype_name
from polyfuse.spec.gdn_conv_prep import CONV_STEPS, SILU_SLOPE, SILU_STEPS, SPEC

CAPABILITY = Capability(devices=("cpu",))

Array = NDArray[np.generic]

FP32_MAX = float(np.finfo(np.float32).max)


def sequences(length: int, cu_seqlens: Array | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per row the sequence that it is in, -1 before the first one; and where each begins, with the end."""
    if cu_seqlens is None:
        return np.zeros(length, np.int64), np.array([0, length])
    starts = cu_seqlens.astype(np.int64)
    return np.searchsorted(starts, np.arange(length), side="right") - 1, starts


def windows(x: F64, state: F64 | None, row: NDArray[np.int64], starts: NDArray[np.int64], width: int) -> F64:
    """What the conv reads for each row, oldest first: [L, C, W]."""
    window = np.zeros((*x.shape, width))
    for t in range(len(x)):
        first = starts[row[t]] if row[t] >= 0 else 0
        for j in range(width):
            source = t - (width - 1) + j
            if source >= first:
                window[t, :, j] = x[source]
            elif state is not None and 0 <= row[t] < len(state):
                window[t, :, j] = state[row[t], :, source - first]  # counted from the end: -1 is the newest
    return window


def final_state(x: F64, state: F64 | None, starts: NDArray[np.int64], width: int) -> F64:
    """The last width - 1 inputs of each sequence, oldest first: [S, C, W - 1]."""
    states = []
    for i in range(len(starts) - 1):
        before = np.zeros((width - 1, x.shape[1])) if state is None else state[i].T
        states.append(np.concatenate([before, x[starts[i] : starts[i + 1]]])[-(width - 1) :].T)
    return np.array(states).reshape(-1, x.shape[1], width - 1)


def exact(
    x: Array,
    weight: Array,
    a: Array,
    b: Array,
    A_log: Array,
    dt_bias: Array,
    *,
    bias: Array | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool = True,
    l2norm_eps: float = 1e-6,
    output_g_exp: bool = False,
    output_final_state: bool = False,
) -> dict[str, Exact]:
    """The unrounded q, k, v, g, beta with their intervals, and the final state."""
    length, heads_v = a.shape
    width, channels = num_k_heads * head_k_dim, x.shape[1]
    inputs, taps = to_f64(x), to_f64(weight)
    state = None if initial_state is None else to_f64(initial_state)
    row, starts = sequences(length, cu_seqlens)
    results = {}
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        window = windows(inputs, state, row, starts, weight.shape[1])
        y = _activated(window, taps, np.zeros(channels) if bias is None else to_f64(bias))
        steps = SPEC.bound("q").steps({"head_k_dim": head_k_dim, "l2norm": l2norm})
        for name, start in (("q", 0), ("k", width)):
            part = _columns(y, start, (num_k_heads, head_k_dim))
            results[name] = _normalised(part, l2norm_eps, steps) if l2norm else part
        results["v"] = _columns(y, 2 * width, (heads_v, head_v_dim))
        results |= gates(a, b, A_log, dt_bias, output_g_exp)
    kept = final_state(inputs, state, starts, weight.shape[1])
    results["final_state"] = Exact.copy(kept if output_final_state else kept[:0])
    return results


def gdn_conv_prep(
    x: Array,
    weight: Array,
    a: Array,
    b: Array,
    A_log: Array,
    dt_bias: Array,
    *,
    bias: Array | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool = True,
    l2norm_eps: float = 1e-6,
    output_g_exp: bool = False,
    output_final_state: bool = False,
) -> tuple[Any, ...]:
    """q, k, v, g, beta, final_state, each rounded once."""
    results = exact(
        x,
        weight,
        a,
        b,
        A_log,
        dt_bias,
        bias=bias,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        num_k_heads=num_k_heads,
        head_k_dim=head_k_dim,
        head_v_dim=head_v_dim,
        l2norm=l2norm,
        l2norm_eps=l2norm_eps,
        output_g_exp=output_g_exp,
        output_final_state=output_final_state,
    )
    dtype = dtype_name(x.dtype)
    return tuple(round_to(r.value, "float32" if name in ("g", "beta") else dtype) for name, r in results.items())


def _activated(window: F64, weight: F64, bias: F64) -> Exact:
    """y [L, C]: the conv of the windows and its SiLU."""
    products = window * weight
    c = products.sum(-1) + bias
    c = np.where(np.abs(c) > FP32_MAX, np.copysign(np.inf, c), c)
    y = c * sigmoid(c)
    of_c = CONV_STEPS * FP32_ROUNDOFF * (np.abs(products).sum(-1) + np.abs(bias)) + FP32_TINY * (
        1 + np.abs(weight).sum(-1)
    )
    of_silu = SILU_STEPS * FP32_ROUNDOFF * np.abs(y) * (1 + np.abs(c)) + FP32_TINY * (1 + np.abs(c))
    return Exact.around(y, SILU_SLOPE * of_c + of_silu)


def _columns(y: Exact, start: int, heads: tuple[int, int]) -> Exact:
    """Some columns of [L, C] as [L, heads, width]."""
    stop = start + heads[0] * heads[1]
    value, low, high = (part[:, start:stop].reshape(len(part), *heads) for part in (y.value, y.low, y.high))
    return Exact(value, low, high)


def _normalised(y: Exact, eps: float, steps: float) -> Exact:
    nearest = np.where((y.low <= 0) & (y.high >= 0), 0.0, np.minimum(np.abs(y.low), np.abs(y.high)))
    farthest = np.maximum(np.abs(y.low), np.abs(y.high))
    scale, largest, least = (_inverse_norm(part, eps) for part in (y.value, nearest, farthest))
    value = y.value * scale
    error = steps * FP32_ROUNDOFF * np.abs(value) + FP32_TINY * (1 + scale)
    low = np.where(y.low >= 0, y.low * least, y.low * largest) - error
    high = np.where(y.high >= 0, y.high * largest, y.high * least) + error
    finite = np.isfinite(value)
    return Exact(value, np.where(finite, low, value), np.where(finite, high, value))


def _inverse_norm(x: F64, eps: float) -> F64:
    """1 / sqrt(sum(x * x) + eps) over the last axis, of a sum that is infinite beyond float32."""
    total = (x * x).sum(-1, keepdims=True) + eps
    return 1 / np.sqrt(np.where(total > FP32_MAX, np.inf, total))
