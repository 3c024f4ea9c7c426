"""The oracle of `gdn_post_conv`; the formula is the docstring of `polyfuse.spec.gdn_post_conv`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from polyfuse.reference._numerics import F64, FP32_MAX, Array, Exact, to_f64
from polyfuse.reference._oracle import Error, Oracle
from polyfuse.spec import Capability
from polyfuse.spec.gdn_post_conv import SPEC

CAPABILITY = Capability(devices=("cpu",))


def formula(
    conv_out: Array,
    a: Array,
    b: Array,
    A_log: Array,
    dt_bias: Array,
    *,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool,
    l2norm_eps: float,
    output_g_exp: bool,
) -> tuple[F64, ...]:
    """q, k [L, H, K], v [L, HV, V], g, beta [L, HV]."""
    q, k, v = split_heads(to_f64(conv_out), num_k_heads, head_k_dim, head_v_dim)
    if l2norm:
        q, k = q * inverse_norm(q, l2norm_eps), k * inverse_norm(k, l2norm_eps)
    g = -np.exp(to_f64(A_log)) * softplus(per_value_head(a) + to_f64(dt_bias))
    if output_g_exp:
        g = np.exp(g)
    return q, k, v, g, sigmoid(per_value_head(b))


def split_heads(rows: F64, heads: int, width: int, width_v: int) -> tuple[F64, F64, F64]:
    """[q | k | v] of each row as q, k [L, heads, width] and v [L, HV, width_v]."""
    q, k, v = np.split(rows, (heads * width, 2 * heads * width), axis=1)
    length = len(rows)
    heads_v = v.shape[1] // width_v
    return q.reshape(length, heads, width), k.reshape(length, heads, width), v.reshape(length, heads_v, width_v)


def per_value_head(gates: Array) -> F64:
    """[L, HV] of that, or of [L, H, HV / H]."""
    return to_f64(gates).reshape(len(gates), int(np.prod(gates.shape[1:])))


def inverse_norm(x: F64, eps: float) -> F64:
    """1 / sqrt(sum(x * x) + eps) over the last axis, of a sum that is infinite beyond float32."""
    total = (x * x).sum(-1, keepdims=True) + eps
    return 1 / np.sqrt(np.where(total > FP32_MAX, np.inf, total))


def softplus(x: F64) -> F64:
    """log(1 + exp(x)), accurate over the whole line."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid(x: F64) -> F64:
    """1 / (1 + exp(-x)), without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def bounds(exact: Mapping[str, F64], given: Any, error: Error) -> dict[str, Exact]:
    """Copies for v, and for q and k without l2norm; the norm's error of |out|; the gates' of their exponents."""
    rows = to_f64(given.conv_out)
    inputs = dict(zip("qk", split_heads(rows, given.num_k_heads, given.head_k_dim, given.head_v_dim), strict=False))
    results = {}
    for name, x in inputs.items():
        relative, flush = error(name)
        if given.l2norm:
            factor = inverse_norm(x, given.l2norm_eps)
            results[name] = Exact.around(exact[name], relative * np.abs(exact[name]) + flush * (1 + factor))
        else:
            results[name] = Exact.copy(exact[name], relative)
    results["v"] = Exact.copy(exact["v"], error("v")[0])
    return results | gate_bounds(exact, given, error)


def gate_bounds(exact: Mapping[str, F64], given: Any, error: Error) -> dict[str, Exact]:
    """The intervals of g and beta."""
    relative, flush = error("g")
    x, rate = per_value_head(given.a) + to_f64(given.dt_bias), to_f64(given.A_log)
    g = -np.exp(rate) * softplus(x)
    flushed = flush * (1 + np.exp(rate))
    of_g = relative * np.abs(g) * (1 + np.maximum(-x, 0) + np.abs(rate)) + flushed
    of_g = np.where(g == 0, flushed, of_g)
    if given.output_g_exp:
        spread = np.expm1(of_g) + relative * (1 + np.abs(g))
        of_g = np.where(exact["g"] == 0, flush, exact["g"] * spread + flush)

    relative, flush = error("beta")
    beta = exact["beta"]
    of_beta = relative * beta * (1 + np.abs(per_value_head(given.b))) + flush
    return {
        "g": Exact.around(exact["g"], of_g),
        "beta": Exact.around(beta, np.where(beta == 0, flush, of_beta)),
    }


gdn_post_conv = Oracle(SPEC, formula, bounds)
