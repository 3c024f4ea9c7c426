"""The activation of `silu_mul_block_quant`, in fp32."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from polyfuse.triton_impl._common import INTERPRETED, LOG2_E, round_to, widen


@triton.jit
def _exact_sigmoid(x):
    """1 / (1 + exp(-x)), bitwise what PyTorch computes on the same device."""
    if INTERPRETED:
        return tl.div_rn(1.0, 1.0 + tl.exp(-x))
    else:
        return tl.div_rn(1.0, 1.0 + libdevice.exp(-x))


@triton.jit
def _silu(gate):
    """gate * sigmoid(gate), bitwise what PyTorch computes on the same device."""
    if INTERPRETED:
        return tl.div_rn(gate, 1.0 + tl.exp(-gate))
    else:
        return tl.div_rn(gate, 1.0 + libdevice.exp(-gate))


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x))."""
    if INTERPRETED:
        return tl.div_rn(1.0, 1.0 + tl.exp(-x))
    else:  # these two flush to 0 what is below the least normal number, which saves a third of the instructions
        return libdevice.fast_dividef(1.0, 1.0 + libdevice.exp2(x * -LOG2_E))


@triton.jit
def activated(
    gate, up, alpha, up_offset, limit, dtype: tl.constexpr, LIMIT_ON: tl.constexpr, MATERIALIZE: tl.constexpr
):
    """gate * sigmoid(alpha * gate) * (up + up_offset); alpha and up_offset may be None for 1 and 0."""
    if limit is not None:  # comparisons with NaN are false: it stays
        if LIMIT_ON == "input":
            gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if up_offset is not None:
        up = up + up_offset
        if MATERIALIZE:
            up = widen(round_to(up, dtype))
    if MATERIALIZE:
        if alpha is None:
            silu = widen(round_to(_silu(gate), dtype))
        else:
            sigmoid = widen(round_to(_exact_sigmoid(widen(round_to(alpha * gate, dtype))), dtype))
            silu = widen(round_to(gate * sigmoid, dtype))
        if LIMIT_ON == "silu":
            silu = tl.where(silu > limit, limit, silu)
        return widen(round_to(silu * up, dtype))
    else:
        inner = gate
        if alpha is not None:
            inner = alpha * gate
        if LIMIT_ON == "silu":
            silu = gate * _sigmoid(inner)
            return tl.where(silu > limit, limit, silu) * up
        else:
            return gate * (_sigmoid(inner) * up)
