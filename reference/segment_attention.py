"""The oracle of `segment_attention`; the formula is the docstring of `polyfuse.spec.segment_attention`."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from polyfuse.reference._numerics import F64, FP32_MAX, Array, Exact, to_f64
from polyfuse.reference._oracle import Error, Oracle
from polyfuse.spec import Capability
from polyfuse.spec.segment_attention import DEVIATIONS, SPEC

CAPABILITY = Capability(devices=("cpu",))


def formula(q: Array, k: Array, v: Array, cu_seqlens: Array, *, scale: float | None, max_seqlen: int | None) -> F64:
    """out [rows, heads, dim]; zero past the last segment, where nothing is promised."""
    out = np.zeros(q.shape)
    for rows in segments(cu_seqlens):
        out[rows] = attention(to_f64(q[rows]), to_f64(k[rows]), to_f64(v[rows]), factor(scale, q.shape[-1]))
    return out


def segments(cu_seqlens: Array) -> list[slice]:
    """The rows of each segment that has any."""
    return [slice(start, end) for start, end in pairwise(cu_seqlens.tolist()) if end > start]


def factor(scale: float | None, dim: int) -> float:
    """What the scores are multiplied by."""
    return max(dim, 1) ** -0.5 if scale is None else scale


def attention(q: F64, k: F64, v: F64, scale: float) -> F64:
    """softmax(scale * q @ k.T) @ v of each head of one segment [rows, heads, dim]."""
    scores = scale * products(q, k)
    return mix(softmax(scores), v)


def products(q: F64, k: F64) -> F64:
    """q @ k.T of each head: [heads, rows, rows]."""
    return q.transpose(1, 0, 2) @ k.transpose(1, 2, 0)


def softmax(scores: F64) -> F64:
    """The weights of each row; they sum to 1."""
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def mix(weights: F64, v: F64) -> F64:
    """weights @ v of each head: [rows, heads, dim]."""
    return (weights @ v.transpose(1, 0, 2)).transpose(1, 0, 2)


def bounds(exact: Mapping[str, F64], given: Any, error: Error) -> dict[str, Exact]:
    """An interval around each row of a segment, and anything past the last one."""
    out = exact["out"]
    allowed = np.full(out.shape, np.inf)
    scale = factor(given.scale, out.shape[-1])
    with np.errstate(divide="ignore"):  # exponentials that are known to be positive only
        for rows in segments(given.cu_seqlens):
            q, k, v = (to_f64(array[rows]) for array in (given.q, given.k, given.v))
            allowed[rows] = _allowed(q, k, v, scale, out[rows], error)
    anything = np.isinf(allowed)
    inside = Exact.around(out, np.where(anything, 0.0, allowed))
    low, high = np.where(anything, -np.inf, inside.low), np.where(anything, np.inf, inside.high)
    return {"out": Exact(out, low, high)}


def _allowed(q: F64, k: F64, v: F64, scale: float, out: F64, error: Error) -> F64:
    """How far a result of one segment may be from `out`; infinitely far where nothing is promised."""
    scores, sizes = scale * products(q, k), products(np.abs(q), np.abs(k))
    below = scores.max(-1, keepdims=True) - scores
    lengths = np.abs(q).sum(-1).T[:, :, None] + np.abs(k).sum(-1).T[:, None, :]
    relative, flush = error("scores")
    of_score = relative * scale * sizes + flush * (1 + scale * lengths) + error("score_accumulator")[0] * np.abs(scores)
    of_exponent = of_score + error("exponentials")[0] * (1 + below)

    exponentials = np.exp(-below)
    least, most = exponentials * np.exp(-of_exponent), exponentials * np.exp(of_exponent)
    far = _error(exponentials, least, most, v, out, error)
    far = np.where(np.isfinite(out), np.where(np.isnan(far), np.inf, far), 0.0)

    beyond = max(1.0, scale) * np.where(np.isfinite(sizes), sizes, 0.0) > FP32_MAX
    without_bound = np.any(np.isneginf(scores) | beyond, axis=-1, keepdims=True)  # [heads, rows, 1]
    rows = np.swapaxes(without_bound, 0, 1) & ~np.isnan(out)
    columns = np.where(np.isinf(v), 0.0, np.abs(v)).sum(0) > FP32_MAX
    may_be_zero = least <= error("weights")[1]
    infinities = mix(may_be_zero.astype(float), np.isinf(v).astype(float)) > 0
    return np.where(rows | columns | infinities, np.inf, far)


def _error(exponentials: F64, least: F64, most: F64, v: F64, out: F64, error: Error) -> F64:
    """How far a result may be from `out`, whose exponentials are known to be between `least` and `most`."""
    total = least.sum(-1, keepdims=True)
    weights, change = most / total, (most - exponentials) / total
    size = mix(weights, np.abs(v))
    shifted = _total_distance(change, v, out)
    relative, flush = error("weights")
    rounded = relative * np.minimum(size, DEVIATIONS * np.sqrt(mix(weights**2, v**2)))
    flushed = flush * np.abs(v).sum(0) / total.transpose(1, 0, 2)
    in_accumulator, _ = error("accumulator")
    in_sum, flush = error("out")
    return shifted + rounded + flushed + in_accumulator * len(v) * np.abs(out) + in_sum * size + flush


def _total_distance(weights: F64, v: F64, out: F64) -> F64:
    """Per row of `out` the weighted sum of how far each row of `v` is from it: [rows, heads, dim]."""
    total = np.empty(out.shape)
    for column in range(out.shape[-1]):
        keys, results = v[:, :, column].T[:, None, :], out[:, :, column].T[:, :, None]
        total[:, :, column] = (weights * np.abs(keys - results)).sum(-1).T
    return total


segment_attention = Oracle(SPEC, formula, bounds)
