"""`gdn_conv_prep`; the formula is the docstring of `polyfuse.spec.gdn_conv_prep`."""

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
    units,
)
from polyfuse_numba.gdn_post_conv import decay, normalise, sigmoid

CAPABILITY = Capability(devices=("cpu",))

TILE = 1024  # columns, of which the inputs of a window and the weights stay in the first-level cache


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
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool = True,
    l2norm_eps: float = 1e-6,
    output_g_exp: bool = False,
    output_final_state: bool = False,
    interleaved: bool = False,
) -> tuple[torch.Tensor, ...]:
    """q, k, v, g, beta, each rounded once, and final_state."""
    rows, heads_v, (channels, taps) = len(x), len(A_log), weight.shape
    before = taps - 1
    if interleaved:
        x = _in_order(x, num_k_heads, head_k_dim, channels)
    q = torch.empty((rows, num_k_heads, head_k_dim), dtype=x.dtype)
    k = torch.empty_like(q)
    v = torch.empty((rows, heads_v, head_v_dim), dtype=x.dtype)
    g = torch.empty((rows, heads_v), dtype=torch.float32)
    beta = torch.empty_like(g)
    starts = np.array([0, rows]) if cu_seqlens is None else cu_seqlens.long().contiguous().numpy()
    sequences = len(starts) - 1 if initial_state is not None else 0
    # Each sequence's inputs become rows, as those of x are.
    state = x.new_empty(0, channels) if initial_state is None else initial_state.transpose(1, 2).reshape(-1, channels)
    inputs = (*rows_of(x), *rows_of(state)[:2])
    if rows:
        number, age = _places(rows, starts, cu_seqlens is None)
        _kernel(
            *inputs,
            sequences,
            number,
            age,
            weight.detach().float().contiguous().numpy(),
            (x.new_zeros(channels) if bias is None else bias).detach().float().contiguous().numpy(),
            *rows_of(a.flatten(1)),
            *rows_of(b.flatten(1)),
            A_log.detach().float().exp().numpy(),
            dt_bias.detach().float().contiguous().numpy(),
            rows,
            (num_k_heads * head_k_dim, num_k_heads * head_k_dim, heads_v * head_v_dim),
            head_k_dim,
            l2norm,
            np.float32(max(l2norm_eps, FP32_TINY)),  # never 0: a zero vector must give zero
            output_g_exp,
            (bits(q), bits(k), bits(v)),
            g.view(-1).numpy(),
            beta.view(-1).numpy(),
            chunks_for(rows),
        )
    kept = x.new_empty((len(starts) - 1 if output_final_state else 0, before, channels))
    if kept.numel():
        _keep(*inputs, sequences, starts, channels, before, bits(kept))
    return q, k, v, g, beta, kept.transpose(1, 2)


def _in_order(x: torch.Tensor, heads: int, head_width: int, channels: int) -> torch.Tensor:
    """A copy [q | k | v] of rows whose key heads are [q | k | v | z], in which the loops below walk along a row."""
    values = channels // heads - 2 * head_width
    q, k, v, _ = x.unflatten(1, (heads, -1)).split([head_width, head_width, values, values], dim=2)
    return torch.cat([part.flatten(1) for part in (q, k, v)], dim=1)


def _places(rows: int, starts: Any, whole: bool) -> tuple[Any, Any]:
    """Per row the sequence that it is in, -1 before the first one; and how many of its rows come before it."""
    row = np.arange(rows)
    if whole:
        return np.zeros_like(row), row
    number = np.searchsorted(starts, row, side="right") - 1
    return number, row - np.where(number < 0, 0, starts[number])


@compiled
def _recall(
    places: Any,
    x: Any,
    x_stride: int,
    kind: int,
    state: Any,
    state_stride: int,
    at: int,
    end: int,
    window: Any,
) -> None:
    """The inputs before a row, that of row t to t % W; `at` to `end` are the words of a row to take."""
    row, age, number, sequences = places
    taps, columns = window.shape[0], (end - at) // units(kind)
    for lag in range(1, taps):
        earlier = window[(row - lag) % taps, :columns]
        if age >= lag:
            place = (row - lag) * x_stride
            decode(kind, x[place + at : place + end], earlier)
        elif 0 <= number < sequences:
            place = ((number + 1) * (taps - 1) + age - lag) * state_stride
            decode(kind, state[place + at : place + end], earlier)
        else:
            earlier[:] = np.float32(0.0)


@compiled
def _multiply_add(x: Any, weight: Any, c: Any) -> None:
    for i in range(c.size):
        c[i] += x[i] * weight[i]


@compiled
def _silu(c: Any) -> None:
    for i in range(c.size):
        c[i] = c[i] / (np.float32(1.0) + exponential(-c[i]))


@parallel
def _kernel(
    x: Any,
    x_stride: int,
    kind: int,
    state: Any,
    state_stride: int,
    sequences: int,
    number: Any,
    age: Any,
    weight: Any,
    bias: Any,
    a: Any,
    a_stride: int,
    a_kind: int,
    b: Any,
    b_stride: int,
    b_kind: int,
    rate: Any,
    dt_bias: Any,
    rows: int,
    widths: Any,
    head_width: int,
    l2norm: bool,
    eps: Any,
    output_g_exp: bool,
    targets: Any,
    g: Any,
    beta: Any,
    chunks: int,
) -> None:
    gates, taps, unit = rate.size, weight.shape[1], units(kind)
    head_tile = head_width * max(1, TILE // head_width)
    for chunk in prange(chunks):
        first_row, end_row = rows * chunk // chunks, rows * (chunk + 1) // chunks
        gate = np.empty(gates, np.float32)
        for row in range(first_row, end_row):
            decode(a_kind, a[row * a_stride : row * a_stride + gates * units(a_kind)], gate)
            decay(gate, dt_bias, rate, output_g_exp, g[row * gates : (row + 1) * gates])
            decode(b_kind, b[row * b_stride : row * b_stride + gates * units(b_kind)], gate)
            sigmoid(gate, beta[row * gates : (row + 1) * gates])
        window = np.empty((taps, max(head_tile, TILE)), np.float32)
        factors, vectors = np.empty_like(window), np.empty(max(head_tile, TILE), np.float32)
        first = 0
        for part in range(3):
            width, target = widths[part], targets[part]
            tile = head_tile if part < 2 else TILE
            for column in range(0, width, tile):
                columns = min(tile, width - column)
                at, end = (first + column) * unit, (first + column + columns) * unit
                c = vectors[:columns]
                for tap in range(taps):
                    factors[tap, :columns] = weight[first + column : first + column + columns, tap]
                for row in range(first_row, end_row):
                    if row == first_row or age[row] == 0:
                        places = (row, age[row], number[row], sequences)
                        _recall(places, x, x_stride, kind, state, state_stride, at, end, window)
                    decode(kind, x[row * x_stride + at : row * x_stride + end], window[row % taps, :columns])
                    c[:] = bias[first + column : first + column + columns]
                    for tap in range(taps):
                        _multiply_add(window[(row + 1 + tap) % taps, :columns], factors[tap, :columns], c)
                    _silu(c)
                    if part < 2 and l2norm:
                        for head in range(columns // head_width):
                            normalise(c[head * head_width : (head + 1) * head_width], eps)
                    place = (row * width + column) * unit
                    encode(kind, c, target[place : place + columns * unit])
            first += width


@parallel
def _keep(
    x: Any,
    x_stride: int,
    kind: int,
    state: Any,
    state_stride: int,
    sequences: int,
    starts: Any,
    channels: int,
    before: int,
    kept: Any,
) -> None:
    """The last `before` inputs of each sequence, bit for bit."""
    width = channels * units(kind)
    for i in prange(starts.size - 1):
        for j in range(before):
            age = starts[i + 1] - starts[i] - before + j
            target = kept[(i * before + j) * width : (i * before + j + 1) * width]
            if age >= 0:
                place = (starts[i] + age) * x_stride
                target[:] = x[place : place + width]
            elif i < sequences:
                place = ((i + 1) * before + age) * state_stride
                target[:] = state[place : place + width]
            else:
                target[:] = np.uint16(0)
