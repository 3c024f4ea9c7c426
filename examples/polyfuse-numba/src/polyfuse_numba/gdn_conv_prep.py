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
    state_pool: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool = True,
    l2norm_eps: float = 1e-6,
    output_g_exp: bool = False,
    output_final_state: bool = False,
    interleaved: bool = False,
    activation: str | None = "silu",
) -> tuple[torch.Tensor, ...]:
    """q, k, v, g, beta, each rounded once, and final_state. Writes the pool."""
    rows, heads_v, (channels, taps) = len(x), len(A_log), weight.shape
    if interleaved:
        x = _in_order(x, num_k_heads, head_k_dim, channels)
    q = torch.empty((rows, num_k_heads, head_k_dim), dtype=x.dtype)
    k = torch.empty_like(q)
    v = torch.empty((rows, heads_v, head_v_dim), dtype=x.dtype)
    g = torch.empty((rows, heads_v), dtype=torch.float32)
    beta = torch.empty_like(g)
    starts = np.array([0, rows]) if cu_seqlens is None else cu_seqlens.long().contiguous().numpy()
    old, owned, slots = initial_state, [], []
    if state_pool is not None:
        numbers = range(len(starts) - 1) if state_indices is None else state_indices.tolist()
        owned = [i for i, slot in enumerate(numbers) if 0 <= slot < len(state_pool)]
        slots = [numbers[i] for i in owned]
        old = _from_slots(state_pool, owned, slots, has_initial_state, len(starts) - 1)
    # Each sequence's inputs become rows, as those of x are.
    columns = taps - 1 if old is None else old.shape[2]
    sequences = 0 if old is None else len(starts) - 1
    state = x.new_empty(0, channels) if old is None else old.transpose(1, 2).reshape(-1, channels)
    inputs = (*rows_of(x), *rows_of(state))
    if rows:
        number, age = _places(rows, starts, cu_seqlens is None)
        _kernel(
            *inputs,
            sequences,
            columns,
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
            activation is not None,
            l2norm,
            np.float32(max(l2norm_eps, FP32_TINY)),  # never 0: a zero vector must give zero
            output_g_exp,
            (bits(q), bits(k), bits(v)),
            g.view(-1).numpy(),
            beta.view(-1).numpy(),
            chunks_for(rows),
        )
    wanted = output_final_state or state_pool is not None
    kept = state.new_empty((len(starts) - 1 if wanted else 0, columns, channels))
    if kept.numel():
        _keep(*inputs, sequences, starts, channels, columns, bits(kept))
    kept = kept.transpose(1, 2)
    if state_pool is None:
        return q, k, v, g, beta, kept
    state_pool[slots] = kept[owned]
    return q, k, v, g, beta, x.new_empty((0, taps - 1, channels)).transpose(1, 2)


def _from_slots(
    pool: torch.Tensor, owned: list[int], slots: list[int], has_initial_state: torch.Tensor | None, sequences: int
) -> torch.Tensor:
    """The states [S, C, n] of the sequences, zeros for those that own no slot or have no initial state."""
    states = pool.new_zeros((sequences, *pool.shape[1:]))
    states[owned] = pool[slots]
    return states if has_initial_state is None else states.masked_fill_(~has_initial_state[:, None, None], 0)


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
    state_kind: int,
    first: int,
    columns: int,
    window: Any,
) -> None:
    """The inputs before a row, that of row t to t % W; of a row are taken so many columns from the first."""
    row, age, number, sequences, kept = places
    taps = window.shape[0]
    for lag in range(1, taps):
        earlier = window[(row - lag) % taps, :columns]
        if age >= lag:
            at = (row - lag) * x_stride + first * units(kind)
            decode(kind, x[at : at + columns * units(kind)], earlier)
        elif 0 <= number < sequences:
            at = ((number + 1) * kept + age - lag) * state_stride + first * units(state_kind)
            decode(state_kind, state[at : at + columns * units(state_kind)], earlier)
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
    state_kind: int,
    sequences: int,
    kept: int,
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
    activate: bool,
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
                        places = (row, age[row], number[row], sequences, kept)
                        states = (state, state_stride, state_kind)
                        _recall(places, x, x_stride, kind, *states, first + column, columns, window)
                    decode(kind, x[row * x_stride + at : row * x_stride + end], window[row % taps, :columns])
                    c[:] = bias[first + column : first + column + columns]
                    for tap in range(taps):
                        _multiply_add(window[(row + 1 + tap) % taps, :columns], factors[tap, :columns], c)
                    if activate:
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
    state_kind: int,
    sequences: int,
    starts: Any,
    channels: int,
    before: int,
    kept: Any,
) -> None:
    """The last `before` inputs of each sequence, bit for bit unless the states have another dtype than x."""
    width, x_width = channels * units(state_kind), channels * units(kind)
    for i in prange(starts.size - 1):
        for j in range(before):
            age = starts[i + 1] - starts[i] - before + j
            target = kept[(i * before + j) * width : (i * before + j + 1) * width]
            if age >= 0:
                place = (starts[i] + age) * x_stride
                if kind == state_kind:
                    target[:] = x[place : place + x_width]
                else:
                    row = np.empty(channels, np.float32)
                    decode(kind, x[place : place + x_width], row)
                    encode(state_kind, row, target)
            elif i < sequences:
                place = ((i + 1) * before + age) * state_stride
                target[:] = state[place : place + width]
            else:
                target[:] = np.uint16(0)
