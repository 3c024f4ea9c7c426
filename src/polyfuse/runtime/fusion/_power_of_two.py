"""Reads a scale's rounding up to a power of two: through its logarithm, or in the bits of its float32."""

from dataclasses import replace
from math import frexp
from typing import Any

import torch
from torch.fx import Node

from polyfuse.runtime.fusion._labels import IsNaN, Label, Scale, Stage, Step
from polyfuse.runtime.fusion._nodes import NARROW, Args, Labels, Reader, dtype_of, same, sizes

aten = torch.ops.aten

_ALL_MANTISSA_BITS = 0x7FFFFF
_NO_MANTISSA_BIT = -0x800000


def _log2(node: Node, args: Args, labels: Labels) -> Label | None:
    """log2(scale)."""
    scale = labels.get(args[0])
    return Step(Stage.LOG2, scale) if isinstance(scale, Scale) and scale.divisor else None


def _ceil(node: Node, args: Args, labels: Labels) -> Label | None:
    """ceil(log2(scale))."""
    match labels.get(args[0]):
        case Step(Stage.LOG2, scale):
            return Step(Stage.CEIL_LOG2, scale)
    return None


def _exp2(node: Node, args: Args, labels: Labels) -> Label | None:
    """2 ** ceil(log2(scale)), as a power of the number 2 or by `exp2`."""
    if node.target is aten.pow.Scalar and args[0] != 2:
        return None
    match labels.get(args[-1]):
        case Step(Stage.CEIL_LOG2, scale):
            inexact = "" if _has_sure_logarithm(scale) else "log2(scale) may round to the integer below it"
            return replace(scale, power_of_two=True, inexact=scale.inexact or inexact)
    return None


def _has_sure_logarithm(scale: Scale) -> bool:
    """Whether no scale is so little above a power of two that its float32 logarithm is that of the power.

    amax of 16-bit values has 11 bits at most, so that amax / divisor is a power of two or at least 2**-11 above one,
    and amax * (1 / divisor) is that power or nearly as far above it.
    """
    bounds = [frexp(bound)[0] for bound in (scale.low, scale.high) if bound is not None]
    return dtype_of(scale.at) in NARROW and not any(0.5 < mantissa < 0.5 + 2**-12 for mantissa in bounds)


def _view_as(node: Node, args: Args, labels: Labels) -> Label | None:
    """A scale's float32 as int32, or the raised bits as float32."""
    match labels.get(args[0]), args[1]:
        case Scale(divisor=float()) as scale, torch.int32 if dtype_of(args[0]) is torch.float32:
            return Step(Stage.BITS, scale)
        case Step(Stage.RAISED_BITS, scale), torch.float32:
            return Step(Stage.RAISED, scale)
    return None


def _add(node: Node, args: Args, labels: Labels) -> Label | None:
    """The carry from any bit of the mantissa into the exponent."""
    match labels.get(args[0]):
        case Step(Stage.BITS, scale) if args[1] == _ALL_MANTISSA_BITS:
            return Step(Stage.CARRIED_BITS, scale)
    return None


def _and(node: Node, args: Args, labels: Labels) -> Label | None:
    """The carried bits without their mantissa."""
    match labels.get(args[0]):
        case Step(Stage.CARRIED_BITS, scale) if args[1] == _NO_MANTISSA_BIT:
            return Step(Stage.RAISED_BITS, scale)
    return None


def _isnan(node: Node, args: Args, labels: Labels) -> Label | None:
    """Where a scale is NaN."""
    scale = labels.get(args[0])
    return IsNaN(scale) if isinstance(scale, Scale) else None


def _where(node: Node, args: Args, labels: Labels) -> Label | None:
    """The raised scale, and NaN where the scale is, whose bits the carry has changed."""
    if not all(same(sizes(node), sizes(argument)) for argument in args):
        return None
    match [labels.get(argument) for argument in args]:
        case IsNaN(label), Scale() as kept, Step(Stage.RAISED, scale) if label == kept == scale:
            return replace(scale, power_of_two=True)
    return None


READERS: dict[Any, Reader] = {
    aten.log2.default: _log2,
    aten.ceil.default: _ceil,
    aten.pow.Scalar: _exp2,
    aten.exp2.default: _exp2,
    aten.view.dtype: _view_as,
    aten.add.Tensor: _add,
    aten.bitwise_and.Scalar: _and,
    aten.isnan.default: _isnan,
    aten.where.self: _where,
}
