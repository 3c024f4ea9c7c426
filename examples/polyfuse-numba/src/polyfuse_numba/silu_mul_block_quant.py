"""`silu_mul_block_quant`; the formula is the docstring of `polyfuse.spec.silu_mul_block_quant`."""

from math import prod
from typing import Any

import numpy as np
import torch
from numba import prange

from polyfuse.spec import Capability
from polyfuse.spec.block_quant import LEAST_DIVISOR, QMAX, scale_floor, scale_strides
from polyfuse_numba._common import (
    as_bits,
    as_float,
    chunks_for,
    compiled,
    decode,
    encode,
    exponential,
    parallel,
    rows_of,
    units,
)

CAPABILITY = Capability(
    devices=("cpu",),
    dtypes={"row_weight": (), "expert_ends": (), "global_scale": ()},  # none of them
    attrs={
        "interleaved": (False,),
        "alpha": (1.0,),
        "up_offset": (0.0,),
        "limit_on": ("input",),
        "quant_dtype": ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "int8"),
        "scale_format": ("float32", "ue8m0", "ue8m0_packed"),
        "scale_layout": ("row_major", "col_major", "col_major_tma"),
        "fill": (None,),
    },
)

# mantissa bits, exponent bias, bits of NaN, bits of -0; int8 has no mantissa
FORMATS = {
    "float8_e4m3fn": (3, 7, 0x7F, 0x80),
    "float8_e5m2": (2, 15, 0x7F, 0x80),
    "float8_e4m3fnuz": (3, 8, 0x80, 0x00),
    "int8": (0, 0, 0, 0),
}
LARGEST = np.finfo(np.float32).max
TILE = 1024  # columns that stay in the first-level cache between the steps


def silu_mul_block_quant(
    x: torch.Tensor,
    *,
    up: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
    expert_ends: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    limit_on: str = "input",
    materialize: bool = False,
    group_size: int = 128,
    quant_dtype: str = "float8_e4m3fn",
    scale_format: str = "float32",
    scale_layout: str = "row_major",
    scale_ub: float | None = None,
    scale_min: float | None = None,
    reciprocal: bool = False,
    expert_alignment: int = 1,
    fill: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and scale, each rounded once; rows past num_rows are left unwritten."""
    if up is None:
        x, up = x.chunk(2, -1)
    lead, width = x.shape[:-1], x.shape[-1]
    rows, groups = prod(lead), -(-width // group_size)
    packed, masked = scale_format == "ue8m0_packed", num_rows is not None
    columns = -(-groups // 4) if packed else groups
    strides = scale_strides(tuple(lead), columns, scale_layout, masked)
    q = torch.empty((*lead, width), dtype=getattr(torch, quant_dtype))
    dtype = torch.int32 if packed else torch.float32
    if strides is None:
        scale = torch.empty((*lead, columns), dtype=dtype)
    else:
        scale = torch.empty_strided((*lead, columns), strides, dtype=dtype)
    if q.numel() == 0:
        return q, scale
    counts = np.array([rows], dtype=np.int32) if num_rows is None else num_rows.contiguous().numpy()
    extent = 1 + sum((n - 1) * s for n, s in zip(scale.shape, scale.stride(), strict=True))
    gates, gate_stride, kind = rows_of(x.reshape(rows, width))
    ups, up_stride, _ = rows_of(up.reshape(rows, width))
    _kernel(
        gates,
        gate_stride,
        ups,
        up_stride,
        kind,
        rows // len(counts),
        width,
        counts,
        group_size,
        group_size * max(1, TILE // group_size),
        np.float32(QMAX[quant_dtype]),
        reciprocal,
        np.array(FORMATS[quant_dtype], dtype=np.uint32),
        scale_format != "float32",
        packed,
        np.float32(np.inf if scale_ub is None else scale_ub),
        np.float32(scale_floor(quant_dtype, scale_min, scale_format)),
        np.float32(LEAST_DIVISOR if scale_min == 0 else 0.0),
        np.float32(np.inf if limit is None else limit),
        materialize,
        q.view(torch.uint8).numpy().reshape(-1),
        scale.as_strided((extent,), (1,)).view(torch.uint32).numpy(),
        scale.stride(0) if masked else 0,
        scale.stride(-2),
        scale.stride(-1),
        chunks_for(rows),
    )
    return q, scale


@compiled
def _one_plus_exp(x: Any) -> Any:
    """1 + exp(x), finite for finite x: sigmoid(gate) is not 0 there, and an infinite up stays infinite."""
    result = np.float32(1.0) + exponential(x)
    return LARGEST if result > LARGEST and x < np.float32(np.inf) else result


@compiled
def _activate(gate: Any, up: Any, limit: Any) -> None:
    """gate <- gate * sigmoid(gate) * up."""
    for i in range(gate.size):
        g = limit if gate[i] > limit else gate[i]
        u = limit if up[i] > limit else up[i]
        u = -limit if u < -limit else u
        gate[i] = g * (u / _one_plus_exp(-g))


@compiled
def _silu(gate: Any, limit: Any) -> None:
    for i in range(gate.size):
        g = limit if gate[i] > limit else gate[i]
        gate[i] = g / _one_plus_exp(-g)


@compiled
def _multiply(gate: Any, up: Any, limit: Any) -> None:
    for i in range(gate.size):
        u = limit if up[i] > limit else up[i]
        u = -limit if u < -limit else u
        gate[i] = gate[i] * u


@compiled
def _scale(y: Any, qmax: Any, reciprocal: bool, power_of_two: bool, upper: Any, floor: Any) -> Any:
    """The scale of one group; the bits of |y| are ordered as numbers, NaN above infinity."""
    largest = np.uint32(0)
    for i in range(y.size):
        magnitude = np.uint32(as_bits(y[i]) & np.uint32(0x7FFFFFFF))
        largest = magnitude if magnitude > largest else largest
    amax = as_float(largest)
    scale = amax * (np.float32(1.0) / qmax) if reciprocal else amax / qmax
    if largest < np.uint32(0x7F800000):
        scale = max(min(scale, upper), floor)
        if power_of_two:
            scale = as_float(np.uint32(np.uint32(as_bits(scale) + np.uint32(0x7FFFFF)) & np.uint32(0xFF800000)))
    return scale


@compiled
def _to_fp8(y: Any, divisor: Any, qmax: Any, form: Any, q: Any) -> None:
    mantissa, bias, nan, negative_zero = form[0], form[1], form[2], form[3]
    shift = np.uint32(np.uint32(np.uint32(23) - mantissa) & np.uint32(31))  # so that LLVM knows: 32 bits will do
    half = np.uint32(np.uint32(np.uint32(1) << np.uint32(shift - np.uint32(1))) - np.uint32(1))
    rebias = np.uint32(np.uint32(np.uint32(127) - bias) << np.uint32(23))
    least_normal = np.uint32(np.uint32(np.uint32(128) - bias) << np.uint32(23))
    # The last bit of `magic` is the step of the subnormals.
    magic = np.uint32(np.uint32(np.uint32(127 + 24) - bias - mantissa) << np.uint32(23))
    for i in range(y.size):
        value = y[i] / divisor[i]
        value = qmax if value > qmax else value
        value = -qmax if value < -qmax else value
        word = as_bits(value)
        sign = np.uint32(np.uint32(word >> np.uint32(24)) & np.uint32(0x80))
        word = np.uint32(word & np.uint32(0x7FFFFFFF))
        odd = np.uint32(np.uint32(word >> shift) & np.uint32(1))
        normal = np.uint32(np.uint32(word + odd + half - rebias) >> shift)
        subnormal = np.uint32(as_bits(as_float(word) + as_float(magic)) - magic)
        result = subnormal if word < least_normal else normal
        signed = np.uint32(result | (negative_zero if result == np.uint32(0) else np.uint32(0x80)) & sign)
        q[i] = np.uint8(nan if word > np.uint32(0x7F800000) else signed)


@compiled
def _to_int8(y: Any, divisor: Any, qmax: Any, q: Any) -> None:
    for i in range(y.size):
        value = y[i] / divisor[i]
        value = qmax if value > qmax else value
        value = -qmax if value < -qmax else value
        value = value if value == value else np.float32(0.0)
        # Adding 1.5 * 2**23 rounds to an integer, which is then in the low bits.
        q[i] = np.uint8(as_bits(value + np.float32(12582912.0)) & np.uint32(0xFF))


@parallel
def _kernel(
    gates: Any,
    gate_stride: int,
    ups: Any,
    up_stride: int,
    kind: int,
    expert_rows: int,
    width: int,
    counts: Any,
    group: int,
    tile: int,
    qmax: Any,
    reciprocal: bool,
    form: Any,
    power_of_two: bool,
    packed: bool,
    upper: Any,
    floor: Any,
    least_divisor: Any,
    limit: Any,
    materialize: bool,
    q: Any,
    scales: Any,
    expert_stride: int,
    scale_row_stride: int,
    scale_column_stride: int,
    chunks: int,
) -> None:
    rows = expert_rows * counts.size
    unit = units(kind)
    for chunk in prange(chunks):
        first_row, end_row = rows * chunk // chunks, rows * (chunk + 1) // chunks
        gate_tile, up_tile = np.empty(tile, np.float32), np.empty(tile, np.float32)
        rounded = np.empty(2 * tile, np.uint16)
        for row in range(first_row, end_row):
            expert = row // expert_rows
            row_in_expert = row - expert * expert_rows
            if row_in_expert >= counts[expert]:
                continue
            scale_at = expert * expert_stride + row_in_expert * scale_row_stride
            for column in range(0, width, tile):
                columns = min(tile, width - column)
                gate, up = gate_tile[:columns], up_tile[:columns]
                at = row * gate_stride + column * unit
                decode(kind, gates[at : at + columns * unit], gate)
                at = row * up_stride + column * unit
                decode(kind, ups[at : at + columns * unit], up)
                if materialize:
                    _silu(gate, limit)
                    encode(kind, gate, rounded[: columns * unit])
                    decode(kind, rounded[: columns * unit], gate)
                    _multiply(gate, up, limit)
                    encode(kind, gate, rounded[: columns * unit])
                    decode(kind, rounded[: columns * unit], gate)
                else:
                    _activate(gate, up, limit)
                for piece in range((columns + group - 1) // group):
                    first, last = piece * group, min((piece + 1) * group, columns)
                    scale = _scale(gate[first:last], qmax, reciprocal, power_of_two, upper, floor)
                    # What `up` held is used up: now the divisor of every column.
                    up[first:last] = least_divisor if scale < least_divisor else scale
                    number = column // group + piece
                    if packed:
                        exponent = np.uint32(np.uint32(as_bits(scale) >> np.uint32(23)) & np.uint32(0xFF))
                        place = scale_at + (number // 4) * scale_column_stride
                        if number % 4 == 0:
                            scales[place] = exponent
                        else:
                            scales[place] |= np.uint32(exponent << np.uint32(8 * (number % 4)))
                    else:
                        scales[scale_at + number * scale_column_stride] = as_bits(scale)
                at = row * width + column
                if form[0] == 0:
                    _to_int8(gate, up, qmax, q[at : at + columns])
                else:
                    _to_fp8(gate, up, qmax, form, q[at : at + columns])
