"""Reads q: y divided by the scale of its group, clamped, rounded and converted to a quantised dtype."""

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from polyfuse.runtime.fusion._labels import Const, IsNaN, Label, Quantised, Ratio, Scale, Stage, Step
from polyfuse.runtime.fusion._nodes import Args, Labels, Reader, dtype_of, is_number, last_size, same, sizes
from polyfuse.runtime.fusion._operands import read_clamp
from polyfuse.runtime.fusion._values import Near, Source, Value

aten, prims = torch.ops.aten, torch.ops.prims

DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.int8)


def _div(node: Node, args: Args, labels: Labels) -> Label | None:
    """y / scale."""
    above, below = args
    match labels.get(above), labels.get(below):
        case y, Scale() as scale if isinstance(y, Value):
            return _ratio(node, above, below, y, scale)
    return None


def _ratio(node: Node, above: Node, below: Node, y: Value, scale: Scale) -> Ratio | Source:
    """y / scale, if each scale meets the elements of its own group."""
    shape, reason = sizes(above), ""
    if scale.y != y:
        reason = "a tensor is divided by the scale of another one, or of itself in another rounding"
    elif last_size(above) != scale.group_size or not same(sizes(below), (*shape[:-1], 1)):
        reason = "the scale of a group does not divide just that group"
    elif dtype_of(node) is not torch.float32:
        reason = f"y / scale is computed in {dtype_of(node)}"
    elif not scale.divisor:
        reason = "y is divided by amax itself"
    return Source(node, Near(reason, True)) if reason else Ratio(scale, inexact=scale.inexact)


def _reciprocal(node: Node, args: Args, labels: Labels) -> Label | None:
    """1 / scale."""
    scale = labels.get(args[0])
    return Step(Stage.RECIPROCAL, scale) if isinstance(scale, Scale) else None


def _mul(node: Node, args: Args, labels: Labels) -> Label | None:
    """y * (1 / scale), or (1 / scale) * 1, as PyTorch decomposes 1.0 / scale; the factors in either order."""
    first, second = args
    for a, b in ((first, second), (second, first)):
        match labels.get(a), labels.get(b):
            case Step(Stage.RECIPROCAL) as label, None if is_number(b) and b == 1:
                return label
            case y, Step(Stage.RECIPROCAL, scale) if isinstance(y, Value):
                ratio = _ratio(node, a, b, y, scale)
                inexact = "" if scale.power_of_two else "y * (1 / scale) is not y / scale"
                return replace(ratio, inexact=ratio.inexact or inexact) if isinstance(ratio, Ratio) else ratio
    return None


def _clamp(node: Node, args: Args, labels: Labels) -> Label | None:
    """A ratio with a lower bound, an upper one, or both; each may be put on it once."""
    clamp = read_clamp(node, args)
    ratio = labels.get(clamp.source) if clamp else None
    if not clamp or not isinstance(ratio, Ratio):
        return None
    match ratio.low, ratio.high:
        case None, None:
            return replace(ratio, low=clamp.low, high=clamp.high)
        case None, float() if clamp.high is None:
            return replace(ratio, low=clamp.low)
        case float(), None if clamp.low is None:
            return replace(ratio, high=clamp.high)
    return None


def _round(node: Node, args: Args, labels: Labels) -> Label | None:
    """A ratio rounded to integers, ties to even."""
    ratio = labels.get(args[0])
    return replace(ratio, rounded=True) if isinstance(ratio, Ratio) else None


def _isnan(node: Node, args: Args, labels: Labels) -> Label | None:
    """Where a ratio is NaN."""
    ratio = labels.get(args[0])
    return IsNaN(ratio) if isinstance(ratio, Ratio) else None


def _where(node: Node, args: Args, labels: Labels) -> Label | None:
    """A ratio with 0 in the place of its NaN; the 0 may be a tensor of any shape."""
    condition, zero, source = args
    if not (same(sizes(node), sizes(condition)) and same(sizes(node), sizes(source))):
        return None
    match labels.get(condition), labels.get(zero), labels.get(source):
        case IsNaN(label), Const(0.0), Ratio() as ratio if label == ratio:
            return replace(ratio, nan_is_zero=True)
    return None


def _convert(node: Node, args: Args, labels: Labels) -> Label | None:
    """q: a float32 ratio in one of the quantised dtypes."""
    source, target = args
    ratio = labels.get(source)
    if isinstance(ratio, Ratio) and target in DTYPES and dtype_of(source) is torch.float32:
        return Quantised(ratio, target)
    return None


READERS: dict[Any, Reader] = {
    aten.div.Tensor: _div,
    aten.reciprocal.default: _reciprocal,
    aten.mul.Tensor: _mul,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: _clamp,
    aten.round.default: _round,
    aten.isnan.default: _isnan,
    aten.where.self: _where,
    prims.convert_element_type.default: _convert,
}
