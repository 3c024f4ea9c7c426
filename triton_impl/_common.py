"""What the kernels and their launchers share."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from polyfuse.spec import Unsupported

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_HERE: AbstractContextManager[Any] = nullcontext()


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """fp32 `value` as `dtype`, to nearest even. The interpreter's own cast to bf16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), float("nan"))
    return value.to(dtype)


@triton.jit
def widen(value):
    """`value` in fp32. For bf16 by shifting: two instructions a pair of elements, where a cast takes three."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


def on_device(op: str, tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """The context to launch in, so that the tensor's device is the current one."""
    device = tensor.device
    if device.type == "cpu":
        if not INTERPRETED.value:
            raise Unsupported(f"{op}: triton runs on CPU tensors only in its interpreter; set TRITON_INTERPRET=1")
        return _HERE
    if device.index == torch.accelerator.current_device_index():
        return _HERE
    return torch.accelerator.device_index(device.index)
