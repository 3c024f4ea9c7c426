"""Reads the scale of each group of y: the largest |y|, divided and bounded."""

import operator
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from polyfuse.runtime.fusion._labels import Capped, Const, Label, Scale, Stage, Step
from polyfuse.runtime.fusion._nodes import (
    Args,
    Labels,
    Reader,
    dtype_of,
    is_float,
    is_number,
    known,
    last_size,
    rounded,
    same,
    sizes,
    with_defaults,
)
from polyfuse.runtime.fusion._operands import read_clamp
from polyfuse.runtime.fusion._values import Magnitude, Near, Source, Value
from polyfuse.spec.block_quant import QMAX

aten, prims = torch.ops.aten, torch.ops.prims

ALSO_INFINITE = "the upper bound of the scale also bounds an infinite one, which scale_ub does not"
MULTIPLYING = ("cuda", "xpu")  # devices on which PyTorch divides by a number as by `Scale.reciprocal`


def _abs(node: Node, args: Args, labels: Labels) -> Label | None:
    """The absolute values of y, or of what is not negative already."""
    label = labels.get(args[0])
    if isinstance(label, Magnitude | Scale):
        return label
    return Magnitude(label) if isinstance(label, Value) and is_float(node) else None


def _largest(node: Node, source: Node, dims: Sequence[int], labels: Labels) -> Scale | Source | None:
    """The maximum over the last dimension of |y|, if that dimension is a group of columns of y."""
    label, shape = labels.get(source), sizes(source)
    if not isinstance(label, Value):
        return None
    if not isinstance(label, Magnitude):
        return Source(node, Near("the scale is made from the largest y, and not from the largest |y|", True))
    if [dim % len(shape) for dim in dims] != [len(shape) - 1]:
        return Source(node, Near("amax is not that of groups of columns, the last dimension of a view of y", True))
    group = last_size(source)
    if not group:
        return Source(node, Near("the size of the groups is not a number when the graph is compiled", True))
    at = _rows_of_groups(label.y, source, group, labels)
    return Scale(label.y, at, group) if at else Source(node, Near("y is not known to be rows of whole groups", True))


def _rows_of_groups(y: Value, groups: Node, group: int, labels: Labels) -> Node | None:
    """A node with y as rows [..., D] of whole groups, best those rows that `groups` [..., D / group, group] divides."""
    found = None
    for node in labels.nodes[y]:
        if not is_float(node) or len(sizes(node)) < 2:
            continue
        *lead, width = sizes(node)
        divides = same(tuple(lead), sizes(groups)[:-2])
        if divides and len(sizes(groups)) > 1 and known(sizes(groups)[-2] * group == width):
            return node
        if not found and (width % group == 0 if isinstance(width, int) else divides):
            found = node
    return found


def _amax(node: Node, args: Args, labels: Labels) -> Label | None:
    """The largest |y| of each group, by `amax`."""
    source, dims, _ = with_defaults(args, None, [], False)
    return _largest(node, source, dims, labels)


def _max(node: Node, args: Args, labels: Labels) -> Label | None:
    """The largest |y| of each group, by `max`, which gives its index too."""
    label = _largest(node, args[0], args[1:2], labels)
    return Step(Stage.WITH_INDEX, label) if isinstance(label, Scale) else label


def _item(node: Node, args: Args, labels: Labels) -> Label | None:
    """The values that `max` gives."""
    match labels.get(args[0]), args[1]:
        case Step(Stage.WITH_INDEX, scale), 0:
            return scale
    return None


def _div(node: Node, args: Args, labels: Labels) -> Label | None:
    """amax divided by a tensor that holds one number, or by a number, which is a multiplication on some devices."""
    above, below = args
    match labels.get(above), labels.get(below):
        case Scale(divisor=None) as scale, Const(value) if same(sizes(node), sizes(above)):
            on_one_device = node.meta["val"].device == below.meta["val"].device
            return divided(node, scale, value) if on_one_device else None
        case Scale(divisor=None) as scale, None if is_number(below):
            device = node.meta["val"].device.type
            known = device in ("cpu", *MULTIPLYING)
            inexact = "" if known else f"on {device}, amax / {below} may be amax * (1 / {below})"
            return divided(node, scale, rounded(below, torch.float32), device in MULTIPLYING, inexact)
    return None


def divided(node: Node, scale: Scale, divisor: float, reciprocal: bool = False, inexact: str = "") -> Scale | None:
    """The scale divided by a number in float32, and its lower bound with it; None for other dtypes and numbers."""
    if dtype_of(node) is not torch.float32 or divisor <= 0:
        return None
    low = scale.low
    if low is not None:
        low = float(np.float32(low) * _inverse(divisor) if reciprocal else np.float32(low) / np.float32(divisor))
    return replace(scale, divisor=divisor, reciprocal=reciprocal, low=low, inexact=scale.inexact or inexact)


def _inverse(divisor: float) -> np.float32:
    return np.float32(1) / np.float32(divisor)


def _mul(node: Node, args: Args, labels: Labels) -> Label | None:
    """amax times the float32 nearest to 1 / qmax; the factors in either order."""
    first, second = args
    for source, factor in ((first, second), (second, first)):
        scale = labels.get(source)
        if isinstance(scale, Scale) and scale.divisor is None and is_number(factor):
            inverse = rounded(factor, torch.float32)
            for qmax in QMAX.values():
                if _inverse(qmax) == inverse:
                    return divided(node, scale, qmax, reciprocal=True)
    return None


def _clamp(node: Node, args: Args, labels: Labels) -> Label | None:
    """A scale with a lower bound, or with an upper one that `_where` may take back for an infinite scale."""
    clamp = read_clamp(node, args)
    scale = labels.get(clamp.source) if clamp else None
    if not clamp or not isinstance(scale, Scale):
        return None
    low, high = clamp.low, clamp.high
    if scale.power_of_two:
        return Source(node, Near("the scale is bounded after it was rounded to a power of two", True))
    if high is None:
        return replace(scale, low=max(low, scale.low or 0.0)) if low is not None and low > 0 else None
    if low is None and high > 0 and scale.low is None and scale.high is None and scale.divisor:
        return Capped(scale, high)
    return Source(node, Near(ALSO_INFINITE, True))


def _eq(node: Node, args: Args, labels: Labels) -> Label | None:
    """Where a scale is infinite."""
    scale = labels.get(args[0])
    return Step(Stage.IS_INFINITE, scale) if isinstance(scale, Scale) and args[1] == inf else None


def _where(node: Node, args: Args, labels: Labels) -> Label | None:
    """A scale with an upper bound that leaves an infinite one alone."""
    if not all(same(sizes(node), sizes(argument)) for argument in args):
        return None
    match [labels.get(argument) for argument in args]:
        case Step(Stage.IS_INFINITE, scale), Scale() as kept, Capped(capped, high) if scale == kept == capped:
            return replace(scale, high=high)
    return None


def _convert(node: Node, args: Args, labels: Labels) -> Label | None:
    """|y| or a scale widened to float32, or amax in the dtype of y, in which it is exact."""
    source, target = args
    match labels.get(source):
        case (Magnitude() | Scale()) as label if target is torch.float32:
            return label
        case Scale(at=at, divisor=None, low=low) as scale if target is dtype_of(at):
            return replace(scale, low=None if low is None else rounded(low, target))
        case Scale():
            return Source(node, Near(f"the scale is rounded to {target}", True))
    return None


READERS: dict[Any, Reader] = {
    aten.abs.default: _abs,
    aten.amax.default: _amax,
    aten.max.dim: _max,
    operator.getitem: _item,
    aten.div.Tensor: _div,
    aten.mul.Tensor: _mul,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: _clamp,
    aten.eq.Scalar: _eq,
    aten.where.self: _where,
    prims.convert_element_type.default: _convert,
}
