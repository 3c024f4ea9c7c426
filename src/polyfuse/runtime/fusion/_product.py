"""Reads gate and up, the halves of a tensor, and y = silu(gate) * up."""

import operator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from polyfuse.runtime.fusion._graph import (
    NARROW,
    Args,
    Labels,
    Reader,
    dtype_of,
    is_call,
    is_number,
    rounded,
    same,
    sizes,
    with_defaults,
)
from polyfuse.runtime.fusion._labels import Half, Halves, Label, Product, Silu

aten, prims = torch.ops.aten, torch.ops.prims


def _half_width(x: Node, dim: int) -> int | None:
    """D, if x is a float tensor [..., 2*D] of at least two dimensions and `dim` is its last one."""
    value = x.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float32, *NARROW):
        return None
    width: int | torch.SymInt = value.shape[-1] if value.ndim >= 2 and dim % value.ndim == value.ndim - 1 else 0
    return width // 2 if isinstance(width, int) and width > 0 and width % 2 == 0 else None


def _slice(node: Node, args: Args, labels: Labels) -> Label | None:
    x, dim, start, end, step = with_defaults(args, None, 0, None, None, 1)
    half = _half_width(x, dim)
    if half is None or step != 1 or not all(bound is None or isinstance(bound, int) for bound in (start, end)):
        return None
    first, last, _ = slice(start, end).indices(2 * half)
    return Half(x, first // half) if (first, last) in ((0, half), (half, 2 * half)) else None


def _split(node: Node, args: Args, labels: Labels) -> Label | None:
    x, parts, dim = with_defaults(args, None, None, 0)
    half = _half_width(x, dim)
    return Halves(x) if half is not None and parts in (half, [half, half]) else None


def _item(node: Node, args: Args, labels: Labels) -> Label | None:
    halves = labels.get(args[0])
    return Half(halves.x, args[1]) if isinstance(halves, Halves) else None


def _clamp(node: Node, args: Args, labels: Labels) -> Label | None:
    source, low, high = clamp_bounds(node, args)
    label = labels.get(source)
    if not isinstance(label, Half) or (label.low is not None and low is not None):
        return None
    if label.high is not None and high is not None:
        return None
    return replace(label, low=label.low if low is None else low, high=label.high if high is None else high)


def clamp_bounds(node: Node, args: Args) -> tuple[Any, float | None, float | None]:
    """What a node clamps and its bounds as that dtype holds them; (None, None, None) if they are not numbers."""
    source, *bounds = with_defaults(args, None, None, None)
    if node.target is aten.clamp_max.default:
        bounds = [None, bounds[0]]
    if not all(bound is None or is_number(bound) for bound in bounds):
        return None, None, None
    low, high = (None if bound is None else rounded(bound, dtype_of(node)) for bound in bounds[:2])
    return source, low, high


def _silu(node: Node, args: Args, labels: Labels) -> Label | None:
    gate = labels.get(args[0])
    return Silu(gate, dtype_of(node), dtype_of(node)) if isinstance(gate, Half) and gate.part == 0 else None


def _in_silu(node: Node) -> bool:
    """Whether a node is one of those that `torch.nn.functional.silu` was decomposed into."""
    return str(node.meta.get("original_aten")) == "aten.silu.default"  # not the same object


def _decomposed(node: Node, argument: Any, labels: Labels) -> Label | None:
    """silu of `argument`, computed in float32 as g / (1 + exp(-g)) or g * sigmoid(g)."""
    gate = labels.get(argument)
    if not (isinstance(gate, Half) and gate.part == 0 and dtype_of(node) is torch.float32):
        return None
    widened = argument.target is prims.convert_element_type.default and _in_silu(argument)
    computed = dtype_of(argument.args[0] if widened else argument)
    return Silu(gate, computed, torch.float32, "" if _in_silu(node) else "silu is written out, not torch's own")


def _div(node: Node, args: Args, labels: Labels) -> Label | None:
    gate, below = args
    exp = below.args[0] if isinstance(below, Node) and below.args else None
    negated = exp.args[0] if isinstance(exp, Node) and exp.args else None
    steps = ((below, aten.add.Tensor, exp, 1), (exp, aten.exp.default, negated), (negated, aten.neg.default, gate))
    return _decomposed(node, gate, labels) if all(is_call(*step) for step in steps) else None


def _mul(node: Node, args: Args, labels: Labels) -> Label | None:
    first, second = args
    for a, b in ((first, second), (second, first)):
        if is_call(b, aten.sigmoid.default, a):
            return _decomposed(node, a, labels)
        silu, up = labels.get(a), labels.get(b)
        if isinstance(silu, Silu) and isinstance(up, Half) and same(sizes(a), sizes(b)):
            limit = silu.gate.high
            bounds = (None, None) if limit is None else (-limit, limit)
            if silu.gate.low is None and up == Half(silu.gate.x, 1, *bounds):
                return Product(silu, dtype_of(node))
    return None


def _convert(node: Node, args: Args, labels: Labels) -> Label | None:
    source, target = args
    label, dtype = labels.get(source), dtype_of(source)
    match label:
        case Half(x, part, low, high) if target is dtype_of(x):
            return Half(x, part, *(None if bound is None else rounded(bound, target) for bound in (low, high)))
        case (Silu() | Product()) as value if dtype is torch.float32 and target in NARROW:
            return replace(value, rounded=target) if value.rounded in (dtype, target) else None
        case Half() | Silu() | Product() if target is torch.float32:
            return label
    return None


READERS: dict[Any, Reader] = {
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    operator.getitem: _item,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: _clamp,
    aten.silu.default: _silu,
    aten.div.Tensor: _div,
    aten.mul.Tensor: _mul,
    prims.convert_element_type.default: _convert,
}
