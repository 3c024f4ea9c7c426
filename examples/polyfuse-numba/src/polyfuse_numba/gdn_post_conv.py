"""`gdn_post_conv`; the formula is the docstring of `polyfuse.spec.gdn_post_conv`."""

from typing import Any

import numpy as np
import torch
from numba import prange

from polyfuse.spec import FP32_TINY, Capability
from polyfuse_numba._common import (
    bits,
    chunks_for,
    compiled,
    decode,
    encode,
    exponential,
    parallel,
    rows_of,
    summing,
    units,
)

CAPABILITY = Capability(devices=("cpu",))


def gdn_post_conv(
    conv_out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool = True,
    l2norm_eps: float = 1e-6,
    output_g_exp: bool = False,
) -> tuple[torch.Tensor, ...]:
    """q, k, v, g, beta, each rounded once."""
    rows, heads_v = len(conv_out), len(A_log)
    q = torch.empty((rows, num_k_heads, head_k_dim), dtype=conv_out.dtype)
    k = torch.empty_like(q)
    v = torch.empty((rows, heads_v, head_v_dim), dtype=conv_out.dtype)
    g = torch.empty((rows, heads_v), dtype=torch.float32)
    beta = torch.empty_like(g)
    if rows:
        _kernel(
            *rows_of(conv_out),
            *rows_of(a.flatten(1)),
            *rows_of(b.flatten(1)),
            A_log.detach().float().exp().numpy(),
            dt_bias.detach().float().contiguous().numpy(),
            rows,
            num_k_heads,
            head_k_dim,
            head_v_dim,
            l2norm,
            np.float32(max(l2norm_eps, FP32_TINY)),  # never 0: a zero vector must give zero
            output_g_exp,
            bits(q),
            bits(k),
            bits(v),
            g.view(-1).numpy(),
            beta.view(-1).numpy(),
            chunks_for(rows),
        )
    return q, k, v, g, beta


@summing
def _sum_of_squares(x: Any) -> Any:
    """Of float32, in any order, as the spec's bound allows."""
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i] * x[i]
    return total


@compiled
def normalise(x: Any, eps: Any) -> None:
    factor = np.float32(1.0) / np.sqrt(_sum_of_squares(x) + eps)
    for i in range(x.size):
        x[i] *= factor


@compiled
def _copy(source: Any, target: Any) -> None:
    for i in range(target.size):
        target[i] = source[i]


@compiled
def _softplus(x: Any) -> Any:
    """max(x, 0) + log1p(exp(-|x|))."""
    small = exponential(-abs(x))
    # log1p(z) = 2 artanh(z / (2 + z)), here with an argument of at most 1/3.
    s = small / (np.float32(2.0) + small)
    square = s * s
    p = np.float32(1 / 17)
    p = p * square + np.float32(1 / 15)
    p = p * square + np.float32(1 / 13)
    p = p * square + np.float32(1 / 11)
    p = p * square + np.float32(1 / 9)
    p = p * square + np.float32(1 / 7)
    p = p * square + np.float32(1 / 5)
    p = p * square + np.float32(1 / 3)
    p = p * square + np.float32(1.0)
    return (x if x > np.float32(0.0) else np.float32(0.0)) + np.float32(2.0) * s * p


@compiled
def decay(a: Any, dt_bias: Any, rate: Any, output_g_exp: bool, g: Any) -> None:
    for i in range(g.size):
        g[i] = -rate[i] * _softplus(a[i] + dt_bias[i])
    if output_g_exp:
        for i in range(g.size):
            g[i] = exponential(g[i])


@compiled
def sigmoid(b: Any, beta: Any) -> None:
    for i in range(beta.size):
        beta[i] = np.float32(1.0) / (np.float32(1.0) + exponential(-b[i]))


@parallel
def _kernel(
    conv: Any,
    conv_stride: int,
    conv_kind: int,
    a: Any,
    a_stride: int,
    a_kind: int,
    b: Any,
    b_stride: int,
    b_kind: int,
    rate: Any,
    dt_bias: Any,
    rows: int,
    heads: int,
    head_width: int,
    value_width: int,
    l2norm: bool,
    eps: Any,
    output_g_exp: bool,
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    chunks: int,
) -> None:
    gates = rate.size
    width = heads * head_width
    unit = units(conv_kind)
    key_bits, value_bits = width * unit, gates * value_width * unit
    for chunk in prange(chunks):
        first_row, end_row = rows * chunk // chunks, rows * (chunk + 1) // chunks
        vectors, gate = np.empty(width, np.float32), np.empty(gates, np.float32)
        for row in range(first_row, end_row):
            at = row * conv_stride
            for target in (q, k):
                source, result = conv[at : at + key_bits], target[row * key_bits : (row + 1) * key_bits]
                if l2norm:
                    decode(conv_kind, source, vectors)
                    for head in range(heads):
                        normalise(vectors[head * head_width : (head + 1) * head_width], eps)
                    encode(conv_kind, vectors, result)
                else:
                    _copy(source, result)
                at += key_bits
            _copy(conv[at : at + value_bits], v[row * value_bits : (row + 1) * value_bits])
            decode(a_kind, a[row * a_stride : row * a_stride + gates * units(a_kind)], gate)
            decay(gate, dt_bias, rate, output_g_exp, g[row * gates : (row + 1) * gates])
            decode(b_kind, b[row * b_stride : row * b_stride + gates * units(b_kind)], gate)
            sigmoid(gate, beta[row * gates : (row + 1) * gates])
