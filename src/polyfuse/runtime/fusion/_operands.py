"""Reads what activations are made of: halves of a tensor, clamps, and products and sums with a number."""

import operator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from polyfuse.runtime.fusion._labels import Label
from polyfuse.runtime.fusion._nodes import (
    NARROW,
    Args,
    Labels,
    Reader,
    dtype_of,
    is_float,
    is_number,
    rounded,
    same,
    sizes,
    with_defaults,
)
from polyfuse.runtime.fusion._values import (
    Clamped,
    Half,
    Halves,
    Normalised,
    Normed,
    Part,
    Product,
    Scaled,
    Shifted,
    Sigmoid,
    Silu,
    Source,
    Unrounded,
    Weighted,
)

aten, prims = torch.ops.aten, torch.ops.prims


class Clamp(NamedTuple):
    """A clamp to numbers: what is clamped, and the bounds as its dtype holds them; None is no bound."""

    source: Any
    low: float | None
    high: float | None


def read_clamp(node: Node, args: Args) -> Clamp | None:
    """The clamp that a node is; None if its bounds are tensors."""
    source, *bounds = with_defaults(args, None, None, None)
    if node.target is aten.clamp_max.default:
        bounds = [None, bounds[0]]
    if not all(bound is None or is_number(bound) for bound in bounds):
        return None
    low, high = (None if bound is None else rounded(bound, dtype_of(node)) for bound in bounds[:2])
    return Clamp(source, low, high)


def _base(x: Node, labels: Labels) -> Node:
    """The tensor that x is, or that it has widened to float32."""
    label = labels.get(x)
    return label.node if isinstance(label, Source) and same(sizes(label.node), sizes(x)) else x


def _half_width(x: Node, dim: int) -> int | None:
    """D, if x is a float tensor [..., 2*D] of at least two dimensions and `dim` is its last one."""
    value = x.meta.get("val")
    if not isinstance(value, torch.Tensor) or not is_float(x):
        return None
    if value.ndim < 2 or dim % value.ndim != value.ndim - 1:
        return None
    width: int | torch.SymInt = value.shape[-1]
    return width // 2 if isinstance(width, int) and width > 0 and width % 2 == 0 else None


def _slice(node: Node, args: Args, labels: Labels) -> Label | None:
    """A slice of x that is just one of its halves."""
    x, dim, start, end, step = with_defaults(args, None, 0, None, None, 1)
    half = _half_width(x, dim)
    if half is None or not all(bound is None or isinstance(bound, int) for bound in (start, end)):
        return None
    first, last, _ = slice(start, end).indices(2 * half)
    for part in Part:
        if step == 1 and (first, last) == (part.value * half, (part.value + 1) * half):
            return Half(_base(x, labels), part)
        if step == 2 and (first, (last + 1 - first) // 2) == (part.value, half):
            return Half(_base(x, labels), part, interleaved=True)
    return None


def _split(node: Node, args: Args, labels: Labels) -> Label | None:
    """A split of x into its two halves."""
    x, parts, dim = with_defaults(args, None, None, 0)
    half = _half_width(x, dim)
    return Halves(_base(x, labels)) if half is not None and parts in (half, [half, half]) else None


def _item(node: Node, args: Args, labels: Labels) -> Label | None:
    """One of the two halves that a split gives."""
    halves, index = labels.get(args[0]), args[1]
    return Half(halves.x, Part(index)) if isinstance(halves, Halves) and index in (0, 1) else None


def _clamp(node: Node, args: Args, labels: Labels) -> Label | None:
    """A tensor with a lower bound, an upper one, or both, each put on it once; a silu with an upper bound."""
    clamp = read_clamp(node, args)
    if clamp is None or not is_float(node):
        return None
    match labels.get(clamp.source), clamp.low, clamp.high:
        case (Source() | Half()) as label, low, high:
            return Clamped(label, low, high)
        case Clamped(low=None) as label, float() as low, None:
            return replace(label, low=low)
        case Clamped(high=None) as label, None, float() as high:
            return replace(label, high=high)
        case Silu(high=None) as label, None, float() as high:
            return replace(label, high=high)
    return None


def _add(node: Node, args: Args, labels: Labels) -> Label | None:
    """A tensor plus a number that is not 0, which the op would not add to a -0; the terms in either order."""
    for term, number in (args[:2], args[1::-1]):
        label = labels.get(term)
        if isinstance(label, Unrounded) and is_number(number) and number != 0 and is_float(node):
            return Shifted(label, rounded(number, torch.float32), dtype_of(node))
    return None


def _mul(node: Node, args: Args, labels: Labels) -> Label | None:
    """A tensor times a number; the factors in either order."""
    for factor, number in (args[:2], args[1::-1]):
        label = labels.get(factor)
        if isinstance(label, Unrounded) and is_number(number) and is_float(node):
            return Scaled(label, rounded(number, torch.float32), dtype_of(node))
    return None


def _own_dtype(label: Unrounded) -> torch.dtype:
    """The dtype of the tensor that a value was made from."""
    if isinstance(label, Clamped):
        label = label.of
    return dtype_of(label.node if isinstance(label, Source) else label.x)


def _convert(node: Node, args: Args, labels: Labels) -> Label | None:
    """A value widened to float32, back in its own dtype, or rounded from float32 to 16 bits."""
    source, target = args
    label, dtype = labels.get(source), dtype_of(source)
    if not is_float(source):
        return None
    match label:
        case Source() | Half() | Clamped() if target in (dtype, torch.float32):
            return label
        case (Source() | Half()) as value if target is _own_dtype(value):
            return value
        case Clamped(of, low, high) if target is _own_dtype(of):
            return Clamped(of, *(None if bound is None else rounded(bound, target) for bound in (low, high)))
        case Shifted() | Scaled() | Sigmoid() | Silu() | Product() | Weighted() | Normalised() | Normed():
            if target in (dtype, torch.float32):
                return label
            if dtype is not torch.float32 or target not in NARROW or label.rounded not in (dtype, target):
                return None
            if isinstance(label, Silu) and label.high is not None:
                label = replace(label, high=rounded(label.high, target))
            return replace(label, rounded=target)
    return None


READERS: dict[Any, Reader] = {
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    operator.getitem: _item,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: _clamp,
    aten.add.Tensor: _add,
    aten.add.Scalar: _add,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    prims.convert_element_type.default: _convert,
}
