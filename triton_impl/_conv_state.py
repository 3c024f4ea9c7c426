"""The states of the conv of a Gated DeltaNet layer: what it looks back at, and what it leaves behind."""

import triton
import triton.language as tl

from polyfuse.triton_impl._common import cdiv, next_power_of_2, round_to, widen
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl._plans import Step, Taken

TILE = 2048  # elements of a pool per program


@triton.jit
def _column(channel, KEY_HEAD: tl.constexpr, H: tl.constexpr, K: tl.constexpr, VALUES: tl.constexpr):
    """The column of a channel in x; KEY_HEAD is 0, or the columns of a key head of an interleaved x, VALUES of v."""
    if KEY_HEAD == 0:
        return channel.to(tl.int64)
    else:
        qk = channel % (H * K)
        of_qk = qk // K * KEY_HEAD + channel // (H * K) * K + qk % K
        v = channel - 2 * H * K
        of_v = v // VALUES * KEY_HEAD + 2 * K + v % VALUES
        return tl.where(v < 0, of_qk, of_v).to(tl.int64)


@triton.jit
def _copied(value, dtype: tl.constexpr):
    """The same numbers in `dtype`, rounded once if it is another one."""
    if value.dtype == dtype:
        return value
    else:
        return round_to(widen(value), dtype)


@triton.jit
def _rows_of(cu_ptr, sequence, length):
    """The first row of a sequence, and the first after it."""
    begin = length * 0
    end = length
    if cu_ptr is not None:
        begin = tl.load(cu_ptr + sequence).to(tl.int32)
        end = tl.load(cu_ptr + sequence + 1).to(tl.int32)
    return begin, end


@triton.jit
def _initial_slot(owners, sequence, sequences):
    """Where the initial state of a sequence is: a slot of a pool, or its own number; negative for zeros."""
    slots_ptr, valid_ptr, slots = owners
    known = (sequence >= 0) & (sequence < sequences)
    slot = tl.where(known, sequence, -1).to(tl.int64)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + sequence, mask=known, other=-1).to(tl.int64)
        slot = tl.where(slot < slots, slot, -1)
    if valid_ptr is not None:
        valid = tl.load(valid_ptr + sequence, mask=known, other=0)
        slot = tl.where(valid != 0, slot, -1)
    return slot


@triton.jit
def begin_window(x1, x2, x3, states, sequence, sequences, channel, lane, age, WIDTH: tl.constexpr, W: tl.constexpr):
    """The inputs 1, 2 and 3 rows before row number `age` of a sequence, from memory or else from its state."""
    state_ptr, state_slot, state_channel, state_tap, owners = states
    s1 = tl.zeros_like(x1)
    s2 = s1
    s3 = s1
    if state_ptr is not None:
        slot = _initial_slot(owners, sequence, sequences)
        live = lane < tl.where(slot >= 0, WIDTH, 0)
        state_ptr += slot * state_slot + channel * state_channel
        s1 = widen(tl.load(state_ptr + (W - 2) * state_tap, mask=live, other=0.0))
        if W > 2:
            s2 = widen(tl.load(state_ptr + (W - 3) * state_tap, mask=live, other=0.0))
        if W > 3:
            s3 = widen(tl.load(state_ptr, mask=live, other=0.0))
    x3 = tl.where(age == 0, s3, tl.where(age == 1, s2, s1))
    x2 = tl.where(age == 0, s2, tl.where(age == 1, s1, x2))
    x1 = tl.where(age == 0, s1, x1)
    return x1, x2, x3


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
    x_ptr, _, _, cu_ptr, x_row, _, _, states = conv
    state_ptr, state_sequence, state_channel, state_tap, _ = states
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    mask = channel < C
    column = _column(channel, KEY_HEAD, H, K, VALUES)
    channel = channel.to(tl.int64)
    begin, end = _rows_of(cu_ptr, sequence, length)
    if state_ptr is not None:
        state_ptr += sequence.to(tl.int64) * state_sequence + channel * state_channel
    out_ptr += sequence.to(tl.int64) * ((W - 1) * C) + channel
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    for tap in tl.static_range(W - 1):
        row = end - (W - 1) + tap
        if row >= begin:
            x = tl.load(x_ptr + row.to(tl.int64) * x_row + column, mask=mask)
            tl.store(out_ptr, _copied(x, dtype), mask=mask)
        elif state_ptr is not None:
            earlier = state_ptr + (row - begin + W - 1).to(tl.int64) * state_tap
            tl.store(out_ptr, tl.load(earlier, mask=mask), mask=mask)
        else:
            tl.store(out_ptr, tl.zeros([CHANNELS], dtype), mask=mask)
        out_ptr += C


@triton.jit(do_not_specialize=["length", "slots"])
def _update_pool(
    x_ptr,  # [length, C], or an interleaved x
    pool_ptr,  # [slots, C, COLUMNS]
    slots_ptr,  # [sequences] or None
    valid_ptr,  # [sequences] or None
    cu_ptr,  # [sequences + 1] or None
    length,
    slots,
    x_row,
    pool_slot,
    pool_channel,
    pool_column,
    KEY_HEAD: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    VALUES: tl.constexpr,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Shifts the rows of one sequence into the columns of its slot, for CHANNELS channels.

    No other program touches these: each sequence has a slot of its own, and the kernel that computes the outputs, whose
    programs all read their sequence's slot, has ended before this one begins. A column may move to one that another
    thread has still to read, so that all are read before the first is written.
    """
    BLOCKS: tl.constexpr = cdiv(C, CHANNELS)
    sequence = tl.program_id(0) // BLOCKS
    slot = sequence.to(tl.int64)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + sequence).to(tl.int64)
    if (slot >= 0) & (slot < slots):
        channel = tl.program_id(0) % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        to = tl.arange(0, next_power_of_2(COLUMNS))[:, None]
        mask = (channel < C) & (to < COLUMNS)
        begin, end = _rows_of(cu_ptr, sequence, length)
        since = to - COLUMNS + (end - begin)  # the row of the sequence that belongs there; negative for an old column
        in_pool = pool_ptr + slot * pool_slot + channel.to(tl.int64) * pool_channel
        is_old = mask & (since < 0)
        if valid_ptr is not None:
            is_old &= since < tl.where(tl.load(valid_ptr + sequence) != 0, 0, -COLUMNS)  # all, or none
        old = tl.load(in_pool + (since + COLUMNS).to(tl.int64) * pool_column, mask=is_old, other=0.0)
        in_x = x_ptr + (begin + since).to(tl.int64) * x_row + _column(channel, KEY_HEAD, H, K, VALUES)
        x = _copied(tl.load(in_x, mask=mask & (since >= 0), other=0.0), pool_ptr.dtype.element_ty)
        tl.debug_barrier()
        tl.store(in_pool + to.to(tl.int64) * pool_column, tl.where(since < 0, old, x), mask=mask)


_update = Launcher("gdn_conv_prep", _update_pool)


def update_pool(
    taken: Taken, places: tuple[int, int, int, int, int], dims: tuple[int, int, int, int], interleaved: bool
) -> Step:
    """The launch that writes the last inputs of each sequence into its slot.

    `places` are those of x, the pool, the sequences' slots, which of these are valid, and cu_seqlens among the inputs.
    """
    x, pool, _, _, cu_seqlens = taken.at(places)
    H, K, HV, V = dims
    values = max(1, HV // H) * V
    key_head = 2 * K + 2 * values if interleaved else 0
    slots, channels, columns = pool.shape
    tile = min(next_power_of_2(channels), max(1, TILE // next_power_of_2(columns)))
    programs = (1 if cu_seqlens is None else len(cu_seqlens) - 1) * -(-channels // tile)
    fixed = x.stride(0), *pool.stride(), key_head, H, K, values, channels, columns, tile
    return Step(_update, (programs, 1, 1), taken, (len(x), slots), fixed, warps=4, takes=places, gives=())
