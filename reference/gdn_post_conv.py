"""The oracle of `gdn_post_conv`; the formula is the docstring of `polyfuse.spec.gdn_post_conv`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfuse.reference._numerics import F64, Exact, round_to, to_f64
from polyfuse.spec import FP32_ROUNDOFF, FP32_TINY, Capability, dtype_name
from polyfuse.spec.gdn_post_conv import SPEC

CAPABILITY = Capability(devices=("cpu",))

Array = NDArray[np.generic]


def exact(
    conv_out: Array,
    a: Array,
    b: Array,
    A_log: Array,
    dt_bias: Array,
    *,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool = True,
    l2norm_eps: float = 1e-6,
    output_g_exp: bool = False,
) -> dict[str, Exact]:
    """The unrounded q, k, v, g, beta with their intervals."""
    length, heads_v = a.shape
    width = num_k_heads * head_k_dim
    steps = SPEC.bound("q").steps({"head_k_dim": head_k_dim, "l2norm": l2norm})
    rows = to_f64(conv_out)
    results = {}
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        for name, part in (("q", rows[:, :width]), ("k", rows[:, width : 2 * width])):
            x = part.reshape(length, num_k_heads, head_k_dim)
            results[name] = _normalised(x, l2norm_eps, steps) if l2norm else Exact.copy(x)
        results["v"] = Exact.copy(rows[:, 2 * width :].reshape(length, heads_v, head_v_dim))

        results |= gates(a, b, A_log, dt_bias, output_g_exp)
    return results


def gdn_post_conv(
    conv_out: Array,
    a: Array,
    b: Array,
    A_log: Array,
    dt_bias: Array,
    *,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool = True,
    l2norm_eps: float = 1e-6,
    output_g_exp: bool = False,
) -> tuple[Any, ...]:
    """q, k, v, g, beta, each rounded once."""
    results = exact(
        conv_out,
        a,
        b,
        A_log,
        dt_bias,
        num_k_heads=num_k_heads,
        head_k_dim=head_k_dim,
        head_v_dim=head_v_dim,
        l2norm=l2norm,
        l2norm_eps=l2norm_eps,
        output_g_exp=output_g_exp,
    )
    dtype = dtype_name(conv_out.dtype)
    rounded = {name: round_to(r.value, "float32" if name in ("g", "beta") else dtype) for name, r in results.items()}
    return tuple(rounded.values())


def gates(a: Array, b: Array, A_log: Array, dt_bias: Array, output_g_exp: bool) -> dict[str, Exact]:
    """g and beta, each [L, HV], with their intervals."""
    steps = {name: SPEC.bound(name).steps({}) for name in ("g", "beta")}
    x, rate = to_f64(a) + to_f64(dt_bias), to_f64(A_log)
    g = -np.exp(rate) * softplus(x)
    error = steps["g"] * FP32_ROUNDOFF * np.abs(g) * (1 + np.abs(x) + np.abs(rate)) + FP32_TINY
    error = np.where(g == 0, FP32_TINY, error)
    if output_g_exp:
        decay = np.exp(g)
        spread = np.expm1(error) + steps["g"] * FP32_ROUNDOFF * (1 + np.abs(g))
        g, error = decay, np.where(decay == 0, FP32_TINY, decay * spread + FP32_TINY)
    decays = Exact.around(g, error)

    write = to_f64(b)
    beta = sigmoid(write)
    error = steps["beta"] * FP32_ROUNDOFF * beta * (1 + np.abs(write)) + FP32_TINY
    return {"g": decays, "beta": Exact.around(beta, np.where(beta == 0, FP32_TINY, error))}


def softplus(x: F64) -> F64:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid(x: F64) -> F64:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def _normalised(x: F64, eps: float, steps: float) -> Exact:
    total = (x * x).sum(-1, keepdims=True) + eps
    total = np.where(total > np.finfo(np.float32).max, np.inf, total)
    scale = 1 / np.sqrt(total)
    value = x * scale
    return Exact.around(value, steps * FP32_ROUNDOFF * np.abs(value) + FP32_TINY * (1 + scale))
