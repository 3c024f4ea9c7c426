"""Reads the scale of each group of y, and q: y divided by it, clamped, rounded and converted."""

import operator
from dataclasses import replace
from math import frexp, inf
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from polyfuse.runtime.fusion._graph import (
    NARROW,
    Args,
    Labels,
    Reader,
    dtype_of,
    is_number,
    rounded,
    same,
    sizes,
    width_of,
    with_defaults,
)
from polyfuse.runtime.fusion._labels import Const, IsNaN, Label, Magnitude, Product, Quantised, Ratio, Scale, Step
from polyfuse.runtime.fusion._product import clamp_bounds
from polyfuse.spec.silu_mul_block_quant import QMAX

aten, prims = torch.ops.aten, torch.ops.prims

DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.int8)
MULTIPLYING = ("cuda", "xpu")  # devices on which PyTorch divides by a number as by `Scale.reciprocal`


def _abs(node: Node, args: Args, labels: Labels) -> Label | None:
    label = labels.get(args[0])
    if isinstance(label, Product):
        return Magnitude(label)
    return label if isinstance(label, Magnitude | Scale) else None


def _largest(source: Node, dim: int, labels: Labels) -> Scale | None:
    """The maximum over the last dimension of |y|, if that dimension is a group of columns of y."""
    label, shape = labels.get(source), sizes(source)
    group = shape[-1] if shape else 0
    if not isinstance(label, Magnitude) or dim % len(shape) != len(shape) - 1 or not isinstance(group, int):
        return None
    width = width_of(label.y.x)
    return Scale(label.y, group) if group and width % group == 0 else None


def _amax(node: Node, args: Args, labels: Labels) -> Label | None:
    source, dims, _ = with_defaults(args, None, [], False)
    return _largest(source, dims[0], labels) if len(dims) == 1 else None


def _max(node: Node, args: Args, labels: Labels) -> Label | None:
    scale = _largest(args[0], args[1], labels)
    return Step("indexed", scale) if scale else None


def _item(node: Node, args: Args, labels: Labels) -> Label | None:
    match labels.get(args[0]), args[1]:
        case Step("indexed", scale), 0:
            return scale
    return None


def _div(node: Node, args: Args, labels: Labels) -> Label | None:
    above, below = args
    match labels.get(above), labels.get(below):
        case Product() as y, Scale() as scale:
            return _ratio(node, above, below, y, scale)
        case Scale(divisor=None) as scale, Const(value) if same(sizes(node), sizes(above)):
            on_one_device = node.meta["val"].device == below.meta["val"].device
            return _divided(node, scale, value) if on_one_device else None
        case Scale(divisor=None) as scale, None if is_number(below):
            device = node.meta["val"].device.type
            known = device in ("cpu", *MULTIPLYING)
            reason = "" if known else f"on {device}, amax / {below} may be amax * (1 / {below})"
            return _divided(node, scale, rounded(below, torch.float32), device in MULTIPLYING, reason)
    return None


def _divided(node: Node, scale: Scale, divisor: float, reciprocal: bool = False, reason: str = "") -> Scale | None:
    if dtype_of(node) is not torch.float32 or divisor <= 0:
        return None
    low = scale.low
    if low is not None:
        low = float(np.float32(low) * _inverse(divisor) if reciprocal else np.float32(low) / np.float32(divisor))
    return replace(scale, divisor=divisor, reciprocal=reciprocal, low=low, inexact=scale.inexact or reason)


def _inverse(divisor: float) -> np.float32:
    return np.float32(1) / np.float32(divisor)


def _ratio(node: Node, above: Node, below: Node, y: Product, scale: Scale) -> Ratio | None:
    """y / scale, if each scale meets the elements of its own group."""
    shape = sizes(above)
    fits = scale.y == y and shape[-1] == scale.group_size and same(sizes(below), (*shape[:-1], 1))
    return Ratio(scale, inexact=scale.inexact) if fits and scale.divisor and dtype_of(node) is torch.float32 else None


def _reciprocal(node: Node, args: Args, labels: Labels) -> Label | None:
    scale = labels.get(args[0])
    return Step("reciprocal", scale) if isinstance(scale, Scale) else None


def _mul(node: Node, args: Args, labels: Labels) -> Label | None:
    first, second = args
    for a, b in ((first, second), (second, first)):
        match labels.get(a), labels.get(b):
            case Step("reciprocal") as label, None if is_number(b) and b == 1:
                return label
            case Scale(divisor=None) as scale, None if is_number(b):
                inverse = rounded(b, torch.float32)
                divisor = next((qmax for qmax in QMAX.values() if _inverse(qmax) == inverse), None)
                return None if divisor is None else _divided(node, scale, divisor, reciprocal=True)
            case Product() as y, Step("reciprocal", scale):
                ratio = _ratio(node, a, b, y, scale)
                reason = "" if scale.power_of_two else "y * (1 / scale) is not y / scale"
                return ratio and replace(ratio, inexact=ratio.inexact or reason)
    return None


def _clamp(node: Node, args: Args, labels: Labels) -> Label | None:
    source, low, high = clamp_bounds(node, args)
    match labels.get(source):
        case Ratio(_, None, None) as ratio:
            return replace(ratio, low=low, high=high)
        case Ratio(_, None, float()) as ratio if high is None:
            return replace(ratio, low=low)
        case Ratio(_, float(), None) as ratio if low is None:
            return replace(ratio, high=high)
        case Scale(power_of_two=False) as scale if high is None and low is not None and low > 0:
            return replace(scale, low=max(low, scale.low or 0.0))
        case Scale(power_of_two=False, low=None, high=None, divisor=float()) as scale if low is None and high:
            return Step("capped", scale, high)
    return None


def _eq(node: Node, args: Args, labels: Labels) -> Label | None:
    scale = labels.get(args[0])
    return Step("infinite", scale) if isinstance(scale, Scale) and args[1] == inf else None


def _isnan(node: Node, args: Args, labels: Labels) -> Label | None:
    label = labels.get(args[0])
    return IsNaN(label) if isinstance(label, Scale | Ratio) else None


def _where(node: Node, args: Args, labels: Labels) -> Label | None:
    found = [labels.get(argument) for argument in args]
    shapes = [sizes(a) for a, label in zip(args, found, strict=True) if not isinstance(label, Const)]
    if not all(same(sizes(node), shape) for shape in shapes):
        return None
    match found:
        case Step("infinite", scale), Scale() as kept, Step("capped", capped, high) if scale == kept == capped:
            return replace(scale, high=high)
        case IsNaN(label), Scale() as kept, Step("raised", scale) if label == kept == scale:
            return replace(scale, power_of_two=True)
        case IsNaN(label), Const(0.0), Ratio() as ratio if label == ratio:
            return replace(ratio, nan_is_zero=True)
    return None


def _view_as(node: Node, args: Args, labels: Labels) -> Label | None:
    match labels.get(args[0]), args[1]:
        case Scale(divisor=float()) as scale, torch.int32 if dtype_of(args[0]) is torch.float32:
            return Step("bits", scale)
        case Step("raised_bits", scale), torch.float32:
            return Step("raised", scale)
    return None


def _add(node: Node, args: Args, labels: Labels) -> Label | None:
    match labels.get(args[0]), args[1]:
        case Step("bits", scale), 0x7FFFFF:
            return Step("carried", scale)
    return None


def _and(node: Node, args: Args, labels: Labels) -> Label | None:
    match labels.get(args[0]), args[1]:
        case Step("carried", scale), -0x800000:
            return Step("raised_bits", scale)
    return None


def _log2(node: Node, args: Args, labels: Labels) -> Label | None:
    scale = labels.get(args[0])
    return Step("log2", scale) if isinstance(scale, Scale) and scale.divisor else None


def _ceil(node: Node, args: Args, labels: Labels) -> Label | None:
    match labels.get(args[0]):
        case Step("log2", scale):
            return Step("ceil_log2", scale)
    return None


def _exp2(node: Node, args: Args, labels: Labels) -> Label | None:
    if node.target is aten.pow.Scalar and args[0] != 2:
        return None
    match labels.get(args[-1]):
        case Step("ceil_log2", scale):
            reason = "" if _has_sure_logarithm(scale) else "log2(scale) may round to the integer below it"
            return replace(scale, power_of_two=True, inexact=scale.inexact or reason)
    return None


def _has_sure_logarithm(scale: Scale) -> bool:
    """Whether no scale is so little above a power of two that its float32 logarithm is that of the power.

    amax of 16-bit values has 11 bits at most, so that amax / divisor is a power of two or at least 2**-11 above one,
    and amax * (1 / divisor) is that power or nearly as far above it.
    """
    bounds = [frexp(bound)[0] for bound in (scale.low, scale.high) if bound is not None]
    return scale.y.rounded in NARROW and not any(0.5 < mantissa < 0.5 + 2**-12 for mantissa in bounds)


def _round(node: Node, args: Args, labels: Labels) -> Label | None:
    label = labels.get(args[0])
    return replace(label, rounded=True) if isinstance(label, Ratio) else None


def _convert(node: Node, args: Args, labels: Labels) -> Label | None:
    source, target = args
    label, dtype = labels.get(source), dtype_of(source)
    match label:
        case Ratio() if target in DTYPES and dtype is torch.float32:
            return Quantised(label, target)
        case Magnitude() | Scale() if target is torch.float32:
            return label
        case Scale(y, divisor=None, low=low) if target is y.rounded:
            return replace(label, low=None if low is None else rounded(low, target))
    return None


READERS: dict[Any, Reader] = {
    aten.abs.default: _abs,
    aten.amax.default: _amax,
    aten.max.dim: _max,
    operator.getitem: _item,
    aten.div.Tensor: _div,
    aten.reciprocal.default: _reciprocal,
    aten.mul.Tensor: _mul,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: _clamp,
    aten.eq.Scalar: _eq,
    aten.isnan.default: _isnan,
    aten.where.self: _where,
    aten.view.dtype: _view_as,
    aten.add.Tensor: _add,
    aten.bitwise_and.Scalar: _and,
    aten.log2.default: _log2,
    aten.ceil.default: _ceil,
    aten.pow.Scalar: _exp2,
    aten.exp2.default: _exp2,
    aten.round.default: _round,
    prims.convert_element_type.default: _convert,
}
