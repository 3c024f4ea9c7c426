"""The conv of a Gated DeltaNet layer for a few tokens of a sequence, whose earlier inputs are in its conv state.

`conv` groups what all functions take: pointers to x and the stride of its tokens; the conv state, its strides, and the
column from which the first token's conv reads; the weights, their strides, and the bias or None.
"""

import triton
import triton.language as tl

from polyfuse.triton_impl._common import next_power_of_2, round_to, widen
from polyfuse.triton_impl._gdn import silu


@triton.jit
def read(ptr, mask, FULL: tl.constexpr):
    """What is there in fp32, zero outside of the mask. With FULL the mask is true everywhere."""
    if FULL:
        return widen(tl.load(ptr))
    return widen(tl.load(ptr, mask=mask, other=0.0))


@triton.jit
def conv_at(conv, column, channel, mask, token, sizes: tl.constexpr):
    """SiLU of the conv of some channels, which are these columns of x, at one token.

    `sizes` are the number of tokens, the conv's width, and whether the mask is true everywhere.
    """
    T: tl.constexpr = sizes[0]
    W: tl.constexpr = sizes[1]
    FULL: tl.constexpr = sizes[2]
    x_ptr, x_token = conv[0]
    state_ptr, state_channel, state_column, begin = conv[1]
    weight_ptr, weight_channel, weight_tap, bias_ptr = conv[2]
    y = tl.zeros(channel.shape, tl.float32)
    if bias_ptr is not None:
        y = read(bias_ptr + channel, mask, FULL)
    x_ptr += column
    state_ptr += channel.to(tl.int64) * state_channel
    weight_ptr += channel * weight_channel
    for lag in tl.static_range(W):
        if T == 1:
            if lag == 0:
                value = read(x_ptr, mask, FULL)
            else:
                value = read(state_ptr + (begin + W - 1 - lag) * state_column, mask, FULL)
        else:
            at = channel * 0 + token - lag
            value = widen(tl.load(x_ptr + at * x_token, mask=mask & (at >= 0), other=0.0))
            if lag > 0:
                kept = tl.load(state_ptr + (begin + W - 1 + at) * state_column, mask=mask & (at < 0), other=0.0)
                value = tl.where(at < 0, widen(kept), value)
        y = tl.fma(read(weight_ptr + (W - 1 - lag) * weight_tap, mask, FULL), value, y)
    return silu(y)


@triton.jit
def shifted(conv, column, channel, mask, shift, T: tl.constexpr, N: tl.constexpr):
    """What the conv states of some channels become: their columns behind number `shift`, and the tokens."""
    x_ptr, x_token = conv[0]
    state_ptr, state_channel, state_column, _ = conv[1]
    place = tl.arange(0, next_power_of_2(N))[None, :]
    token = place - (N - T)
    mask = mask[:, None] & (place < N)
    state_ptr += channel.to(tl.int64)[:, None] * state_channel
    old = tl.load(state_ptr + (place + 1 + shift) * state_column, mask=mask & (token < 0), other=0.0)
    new = tl.load(x_ptr + column[:, None] + token * x_token, mask=mask & (token >= 0), other=0.0)
    return tl.where(token < 0, widen(old), widen(new))


@triton.jit
def store_shifted(conv, value, channel, mask, tokens, T: tl.constexpr, N: tl.constexpr):
    """Writes what `shifted` gives, but for the columns of padding: so many `tokens` are none."""
    state_ptr, state_channel, state_column, _ = conv[1]
    place = tl.arange(0, next_power_of_2(N))[None, :]
    mask = mask[:, None] & (place - (N - T) < tokens)
    state_ptr += channel.to(tl.int64)[:, None] * state_channel
    tl.store(state_ptr + place * state_column, round_to(value, state_ptr.dtype.element_ty), mask=mask & (place < N))
