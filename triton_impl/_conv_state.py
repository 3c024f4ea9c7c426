"""What the conv of a Gated DeltaNet layer leaves behind: the last inputs of each sequence."""

import triton
import triton.language as tl


@triton.jit
def _column(channel, KEY_HEAD: tl.constexpr, H: tl.constexpr, K: tl.constexpr, VALUES: tl.constexpr):
    """The column of a channel in an interleaved x, whose key heads have VALUES columns of v."""
    qk = channel % (H * K)
    of_qk = qk // K * KEY_HEAD + channel // (H * K) * K + qk % K
    v = channel - 2 * H * K
    of_v = v // VALUES * KEY_HEAD + 2 * K + v % VALUES
    return tl.where(v < 0, of_qk, of_v)


@triton.jit
def store_final_state(
    conv,
    out_ptr,
    length,
    sequence,
    block,
    KEY_HEAD: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    VALUES: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Stores the last W - 1 inputs of CHANNELS channels of one sequence; `out_ptr` is to [sequences, W - 1, C]."""
    x_ptr, _, _, state_ptr, cu_ptr, x_row, _, _, state_strides = conv
    state_sequence, state_channel, state_tap = state_strides
    channel = (block * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    mask = channel < C
    if KEY_HEAD:
        column = _column(block * CHANNELS + tl.arange(0, CHANNELS), KEY_HEAD, H, K, VALUES).to(tl.int64)
    else:
        column = channel
    begin = 0
    end = length
    if cu_ptr is not None:
        begin = tl.load(cu_ptr + sequence).to(tl.int32)
        end = tl.load(cu_ptr + sequence + 1).to(tl.int32)
    if state_ptr is not None:
        state_ptr += sequence.to(tl.int64) * state_sequence + channel * state_channel
    out_ptr += sequence.to(tl.int64) * ((W - 1) * C) + channel
    for tap in tl.static_range(W - 1):
        row = end - (W - 1) + tap
        if row >= begin:
            tl.store(out_ptr, tl.load(x_ptr + row.to(tl.int64) * x_row + column, mask=mask), mask=mask)
        elif state_ptr is not None:
            earlier = state_ptr + (row - begin + W - 1).to(tl.int64) * state_tap
            tl.store(out_ptr, tl.load(earlier, mask=mask), mask=mask)
        else:
            tl.store(out_ptr, tl.zeros([CHANNELS], out_ptr.dtype.element_ty), mask=mask)
        out_ptr += C
