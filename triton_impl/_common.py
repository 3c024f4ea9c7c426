"""What all kernels share: what they run on, whether they are interpreted, and conversions from and to fp32."""

from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import triton
import triton.language as tl

from polyfuse.spec import Capability

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
interpreting: AbstractContextManager[Any] = nullcontext()  # what a kernel is interpreted in
if INTERPRETED.value:
    with suppress(ImportError, AttributeError, TypeError):  # a later Triton may be made differently: it is just slower
        from polyfuse.triton_impl._interpreter import Quickly

        interpreting = Quickly()
ACCELERATORS = ("cuda", "rocm", "xpu")
LOG2_E = tl.constexpr(1.4426950408889634)


def capability(**restrictions: Any) -> Capability:
    """What every kernel runs on, and what one restricts beyond that."""
    return Capability(devices=(*ACCELERATORS, "cpu"), interpreted=("cpu",), compiled=ACCELERATORS, **restrictions)


# Triton has both, but lets other packages replace its own: SGLang's stands for plain integers alone, so that no kernel
# that names it compiles any more.
@triton.constexpr_function
def cdiv(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


@triton.constexpr_function
def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """fp32 `value` as `dtype`, to nearest even. The interpreter's own cast to bf16 is wrong."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value == value, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def product(a, b):
    """a * b, rounded, in fp32, as what a sum over lanes of few numbers each takes.

    A plain product is fused with the first addition, of another lane's product, which is rounded: of two lanes that add
    up each other's, either has other bits, and which of them a kernel stores is chance.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def widen(value):
    """`value` in fp32. For bf16 by shifting: two instructions a pair of elements, where a cast takes three."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)
