"""What the kernels share: tensors as bits, conversions between bits and float32, and an exponential.

A kernel sees every 2-D tensor as a flat array of uint16 with a row stride, and a number for its dtype, so one compiled
version serves all dtypes. It decodes a piece of a row into float32, computes, and encodes the result with one rounding.
The loops hold no calls and no branches: LLVM turns each into vector instructions.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numpy.typing import NDArray

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile to machine code. A product and a sum may become one instruction, which rounds once less."""
    return _jit(function, {"contract"})


def summing(function: _Function) -> _Function:
    """The same, and a sum may be taken in any order: vector lanes add side by side."""
    return _jit(function, {"contract", "reassoc"})


def parallel(function: _Function) -> _Function:
    """The same as `compiled`, with the iterations of `prange` spread over threads."""
    return _jit(function, {"contract"}, parallel=True)


def _jit(function: Any, fastmath: set[str], parallel: bool = False) -> Any:
    decorate = numba.njit(cache=True, error_model="numpy", nogil=True, fastmath=fastmath, parallel=parallel)
    return decorate(function)


def bits(x: torch.Tensor) -> NDArray[np.uint16]:
    """The memory of a contiguous tensor as a flat array of uint16, without a copy."""
    return x.view(torch.uint16).numpy().reshape(-1)


def rows_of(x: torch.Tensor) -> tuple[NDArray[np.uint16], int, int]:
    """A tensor [rows, width] as (flat bits, row stride in uint16, kind); copied only if its last stride is not 1."""
    if x.stride(1) != 1:
        x = x.contiguous()
    stride, kind = x.stride(0) * (x.element_size() // 2), KINDS[x.dtype]
    # As flat memory, also where it is contiguous: a dimension of one element may then have any stride.
    span = (x.shape[0] - 1) * x.stride(0) + x.shape[1] if x.numel() else 0
    return bits(x.as_strided((span,), (1,))), stride, kind


def chunks_for(rows: int) -> int:
    """Into how many contiguous pieces the rows are cut: one per thread."""
    return min(rows, numba.get_num_threads())


@compiled
def units(kind: int) -> int:
    """uint16 per element."""
    return 2 if kind == FLOAT32 else 1


@compiled
def as_float(word: Any) -> Any:
    """The float32 of these 32 bits."""
    return np.uint32(word).view(np.float32)


@compiled
def as_bits(value: Any) -> Any:
    """The 32 bits of a float32."""
    return np.float32(value).view(np.uint32)


@compiled
def from_half(half: Any) -> Any:
    """float16 bits to float32, exactly."""
    magnitude = np.uint32(np.uint32(half & np.uint32(0x7FFF)) << np.uint32(13))
    # 2**112 moves the exponent's bias from 15 to 127, subnormals included.
    value = as_float(magnitude) * np.float32(2.0**112)
    special = np.uint32(0x7F800000) if value >= np.float32(65536.0) else np.uint32(0)
    sign = np.uint32(np.uint32(half & np.uint32(0x8000)) << np.uint32(16))
    return as_float(np.uint32(as_bits(value) | np.uint32(special | sign)))


@compiled
def to_half(value: Any) -> Any:
    """float32 to float16 bits, to nearest even."""
    word = as_bits(value)
    sign = np.uint32(np.uint32(word >> np.uint32(16)) & np.uint32(0x8000))
    word = np.uint32(word & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(word >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(word + odd - np.uint32(0x38000000 - 0xFFF)) >> np.uint32(13))
    # Half a unit: the sum's last bit is float16's subnormal step 2**-24.
    subnormal = np.uint32(as_bits(as_float(word) + np.float32(0.5)) - np.uint32(0x3F000000))
    result = subnormal if word < np.uint32(0x38800000) else normal
    result = np.uint32(0x7C00) if word >= np.uint32(0x477FF000) else result
    result = np.uint32(0x7E00) if word > np.uint32(0x7F800000) else result
    return np.uint16(result | sign)


@compiled
def to_bfloat(value: Any) -> Any:
    """float32 to bfloat16 bits, to nearest even."""
    word = as_bits(value)
    odd = np.uint32(np.uint32(word >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(word + odd + np.uint32(0x7FFF)) >> np.uint32(16))
    nan = np.uint32(word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(np.uint32(0x7FC0) if nan else rounded)


@compiled
def decode(kind: int, source: Any, target: Any) -> None:
    """Bits to float32, `target.size` of them."""
    if kind == BFLOAT16:
        for i in range(target.size):
            target[i] = as_float(np.uint32(np.uint32(source[i]) << np.uint32(16)))
    elif kind == FLOAT16:
        for i in range(target.size):
            target[i] = from_half(np.uint32(source[i]))
    else:
        values = source.view(np.float32)
        for i in range(target.size):
            target[i] = values[i]


@compiled
def encode(kind: int, source: Any, target: Any) -> None:
    """float32 to bits, `source.size` of them, to nearest even."""
    if kind == BFLOAT16:
        for i in range(source.size):
            target[i] = to_bfloat(source[i])
    elif kind == FLOAT16:
        for i in range(source.size):
            target[i] = to_half(source[i])
    else:
        values = target.view(np.float32)
        for i in range(source.size):
            values[i] = source[i]


@compiled
def exponential(x: Any) -> Any:
    """exp(x) within 2 ulp, subnormal results included."""
    inside = np.float32(90.0) if x > np.float32(90.0) else x
    inside = np.float32(-105.0) if inside < np.float32(-105.0) else inside
    # Adding 1.5 * 2**23 rounds to an integer, which is then in the low bits.
    shifted = inside * np.float32(1.4426950408889634) + np.float32(12582912.0)
    n = shifted - np.float32(12582912.0)
    # ln(2) in two parts, the first with so few bits that n times it is exact.
    r = inside - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    # 2**n as a product of two powers, as n goes past the exponents of normal numbers.
    whole = np.int32(as_bits(shifted)) - np.int32(0x4B400000)
    half = np.int32(np.int32(whole) >> np.int32(1))
    first = as_float(np.uint32(np.uint32(half + np.int32(127)) << np.uint32(23)))
    second = as_float(np.uint32(np.uint32(np.int32(whole - half) + np.int32(127)) << np.uint32(23)))
    return p * first * second
