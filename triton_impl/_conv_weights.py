"""How a program of `gdn_conv_prep` reads the weights of its channels: as one number where they are four of 16 bits."""

import torch
import triton
import triton.language as tl

from polyfuse.triton_impl._common import next_power_of_2, widen


def as_one_number(weight: torch.Tensor) -> torch.Tensor:
    """The weights of a channel as one number, if they lie as one does."""
    return weight.view(torch.int64) if weight.is_contiguous() and weight.data_ptr() % 8 == 0 else weight


@triton.jit
def _unpacked(bits, DTYPE: tl.constexpr):
    """The 16-bit numbers in the lowest bits, in fp32."""
    return widen(bits.to(tl.int16).to(DTYPE, bitcast=True))


@triton.jit
def read_weights(weight_ptr, mask, stride, W: tl.constexpr, DTYPE: tl.constexpr):
    """The conv's weights, the row's own first, as four tiles over channels, of which the first W count."""
    if weight_ptr.dtype.element_ty == tl.int64:  # four of DTYPE in one: no thread needs those of another
        packed = tl.load(weight_ptr, mask=mask, other=0)
        return (
            _unpacked(packed >> 48, DTYPE),
            _unpacked(packed >> 32, DTYPE),
            _unpacked(packed >> 16, DTYPE),
            _unpacked(packed, DTYPE),
        )
    TAPS: tl.constexpr = next_power_of_2(W)
    tap = tl.arange(0, TAPS)[None, None, None, :]
    inside = mask[:, :, :, None] & (tap < W)
    weight = widen(tl.load(weight_ptr[:, :, :, None] + tap * stride, mask=inside, other=0.0))
    if W == 2:
        first, second = tl.split(weight)
        taps = (second, first, first, first)
    else:
        even, odd = tl.split(tl.reshape(weight, [mask.shape[0], mask.shape[1], mask.shape[2], 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        if W == 3:
            taps = (third, second, first, first)
        else:
            taps = (fourth, third, second, first)
    return taps
