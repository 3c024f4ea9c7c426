"""Reads gate and up, the halves of a tensor, and y = silu(gate) * up."""

import operator
from dataclasses import replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch.fx import Node

from polyfuse.runtime.fusion._labels import Half, Halves, Label, Part, Product, Silu
from polyfuse.runtime.fusion._nodes import (
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


def _half_width(x: Node, dim: int) -> int | None:
    """D, if x is a float tensor [..., 2*D] of at least two dimensions and `dim` is its last one."""
    value = x.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float32, *NARROW):
        return None
    if value.ndim < 2 or dim % value.ndim != value.ndim - 1:
        return None
    width: int | torch.SymInt = value.shape[-1]
    return width // 2 if isinstance(width, int) and width > 0 and width % 2 == 0 else None


def _slice(node: Node, args: Args, labels: Labels) -> Label | None:
    """A slice of x that is just one of its halves."""
    x, dim, start, end, step = with_defaults(args, None, 0, None, None, 1)
    half = _half_width(x, dim)
    if half is None or step != 1 or not all(bound is None or isinstance(bound, int) for bound in (start, end)):
        return None
    first, last, _ = slice(start, end).indices(2 * half)
    if (first, last) == (0, half):
        return Half(x, Part.GATE)
    if (first, last) == (half, 2 * half):
        return Half(x, Part.UP)
    return None


def _split(node: Node, args: Args, labels: Labels) -> Label | None:
    """A split of x into its two halves."""
    x, parts, dim = with_defaults(args, None, None, 0)
    half = _half_width(x, dim)
    return Halves(x) if half is not None and parts in (half, [half, half]) else None


def _item(node: Node, args: Args, labels: Labels) -> Label | None:
    """One of the two halves that a split gives."""
    halves, index = labels.get(args[0]), args[1]
    return Half(halves.x, Part(index)) if isinstance(halves, Halves) and index in (0, 1) else None


def _clamp(node: Node, args: Args, labels: Labels) -> Label | None:
    """A half with a lower bound, an upper one, or both; each may be put on it once."""
    clamp = read_clamp(node, args)
    half = labels.get(clamp.source) if clamp else None
    if not clamp or not isinstance(half, Half):
        return None
    if (half.low is not None and clamp.low is not None) or (half.high is not None and clamp.high is not None):
        return None
    low = half.low if clamp.low is None else clamp.low
    high = half.high if clamp.high is None else clamp.high
    return replace(half, low=low, high=high)


def _silu(node: Node, args: Args, labels: Labels) -> Label | None:
    """SiLU of the gate, as one node in the gate's dtype."""
    gate = labels.get(args[0])
    return Silu(gate, dtype_of(node), dtype_of(node)) if _is_gate(gate) else None


def _is_gate(label: Label | None) -> TypeGuard[Half]:
    return isinstance(label, Half) and label.part is Part.GATE


def _in_silu(node: Node) -> bool:
    """Whether a node is one of those that `torch.nn.functional.silu` was decomposed into."""
    return str(node.meta.get("original_aten")) == "aten.silu.default"  # not the same object


def _decomposed(node: Node, argument: Any, labels: Labels) -> Label | None:
    """SiLU of `argument`, computed in float32 as g / (1 + exp(-g)) or g * sigmoid(g)."""
    gate = labels.get(argument)
    if not _is_gate(gate) or dtype_of(node) is not torch.float32:
        return None
    widened = argument.target is prims.convert_element_type.default and _in_silu(argument)
    computed = dtype_of(argument.args[0] if widened else argument)
    return Silu(gate, computed, torch.float32, "" if _in_silu(node) else "silu is written out, not torch's own")


def _div(node: Node, args: Args, labels: Labels) -> Label | None:
    """SiLU of the gate as gate / (1 + exp(-gate))."""
    gate, one_plus_exp = args
    exp = one_plus_exp.args[0] if isinstance(one_plus_exp, Node) and one_plus_exp.args else None
    negated = exp.args[0] if isinstance(exp, Node) and exp.args else None
    is_silu = (
        is_call(one_plus_exp, aten.add.Tensor, exp, 1)
        and is_call(exp, aten.exp.default, negated)
        and is_call(negated, aten.neg.default, gate)
    )
    return _decomposed(node, gate, labels) if is_silu else None


def _mul(node: Node, args: Args, labels: Labels) -> Label | None:
    """SiLU of the gate as gate * sigmoid(gate), or y; the factors in either order."""
    first, second = args
    for a, b in ((first, second), (second, first)):
        if is_call(b, aten.sigmoid.default, a):
            return _decomposed(node, a, labels)
        silu, up = labels.get(a), labels.get(b)
        if isinstance(silu, Silu) and isinstance(up, Half) and same(sizes(a), sizes(b)) and _is_its_up(up, silu.gate):
            return Product(silu, dtype_of(node))
    return None


def _is_its_up(up: Half, gate: Half) -> bool:
    """Whether `up` belongs to the gate, both clamped to the op's `limit` or neither: gate above, up on both sides."""
    limit = gate.high
    expected = Half(gate.x, Part.UP) if limit is None else Half(gate.x, Part.UP, -limit, limit)
    return gate.low is None and up == expected


def _convert(node: Node, args: Args, labels: Labels) -> Label | None:
    """A half back in its own dtype, silu or y rounded to 16 bits, or any of these widened to float32."""
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
