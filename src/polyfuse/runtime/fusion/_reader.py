"""Reads a graph of ATen operations, front to back, into labels.

A reader gives a node's label from those of its arguments, or None for what it does not understand completely, so that
no label rests on a guess. Several readers may know an operation; the first label holds.
"""

from typing import Any

import torch
from torch.fx import Graph, Node

from polyfuse.runtime.fusion import _activation, _layout, _norm, _operands, _power_of_two, _ratio, _scale
from polyfuse.runtime.fusion._labels import Capped, Const, IsNaN, Label, Moved, Ratio, Scale, Step
from polyfuse.runtime.fusion._nodes import Args, Labels, Reader, dtype_of, is_number, rounded, same, sizes
from polyfuse.runtime.fusion._values import (
    Clamped,
    Half,
    Magnitude,
    Near,
    Normalised,
    Normed,
    Product,
    Silu,
    Source,
    Value,
    Weighted,
    near_of,
)

aten = torch.ops.aten


def read(graph: Graph) -> Labels:
    """The label of every node that has one: a tensor of which no reader knows more is a `Source`."""
    labels = Labels()
    for node in graph.nodes:
        label = _read(node, labels)
        if label is None and isinstance(node.meta.get("val"), torch.Tensor):
            label = Source(node, _near(node, labels))
        if label is not None:
            labels[node] = label
    return labels


def _read(node: Node, labels: Labels) -> Label | None:
    """The label that the first reader gives which understands a node."""
    if node.op != "call_function" or (node.kwargs and node.target not in _WITH_KEYWORDS):
        return None
    found = (reader(node, node.args, labels) for reader in _READERS.get(node.target, ()))
    return next((label for label in found if label is not None), None)


def _near(node: Node, labels: Labels) -> Near | None:
    """What a value almost is that an element-wise operation or a view, of which no reader knows, makes from others."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not (torch.Tag.pointwise in target.tags or target in _CARRYING):
        return None
    nears: list[Near] = []
    for argument in node.all_input_nodes:
        label = labels.get(argument)
        step = f"is rounded to {dtype_of(node)}" if target is _CONVERT else f"goes through {target.overloadpacket}"
        match label:
            case Capped():
                nears.append(Near(_scale.ALSO_INFINITE, True))
            case Magnitude() | Scale() | Step() | IsNaN():
                nears.append(Near(f"the scale, or what it is made from, {step}", True))
            case Ratio():
                nears.append(Near(f"y / scale {step}", True))
            case Silu() | Product() | Weighted():
                name = "silu(gate)" if isinstance(label, Silu) else "silu(gate) * up"
                nears.append(Near(f"silu_mul_block_quant: {name} {step}", False))
            case Normalised() | Normed():
                nears.append(Near(f"rms_norm_block_quant: a normalised row {step}", False))
            case _ if isinstance(label, Value) and (near := near_of(label)):
                nears.append(near)
    return max(nears, key=lambda near: near.scaled, default=None)


def _constant(node: Node, args: Args, labels: Labels) -> Label | None:
    """A float32 tensor filled with a number."""
    value = args[-1]
    return Const(rounded(value, torch.float32)) if is_number(value) and dtype_of(node) is torch.float32 else None


def _view(node: Node, args: Args, labels: Labels) -> Label | None:
    """A view with the elements in the same row-major order, which the dimensions of `Moved` are not."""
    label = labels.get(args[0])
    return None if isinstance(label, Moved) else label


def _alias(node: Node, args: Args, labels: Labels) -> Label | None:
    """The same tensor."""
    return labels.get(args[0])


def _clone(node: Node, args: Args, labels: Labels) -> Label | None:
    """A copy, but of a float32 gate: on a CPU the last bit of silu depends on where in memory its argument lies.

    The 16-bit ones round that bit away, whatever their value.
    """
    label = labels.get(args[0])
    return None if isinstance(label, Source | Half | Clamped) and dtype_of(node) is torch.float32 else label


def _copy(node: Node, args: Args, labels: Labels) -> Label | None:
    """A copy into all of a tensor of the same shape and dtype."""
    source = args[1]
    whole = same(sizes(node), sizes(source)) and dtype_of(node) is dtype_of(source)
    return _clone(node, args[1:], labels) if whole else None


_ANY_LABEL: dict[Any, Reader] = {
    aten.full.default: _constant,
    aten.full_like.default: _constant,
    aten.scalar_tensor.default: _constant,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.unsqueeze.default: _view,
    aten.squeeze.dim: _view,
    aten.squeeze.dims: _view,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten.copy.default: _copy,
}
_CONVERT = torch.ops.prims.convert_element_type.default
_CARRYING = (
    *_ANY_LABEL,
    aten.expand.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.constant_pad_nd.default,
    _CONVERT,
)
_WITH_KEYWORDS = (aten.full.default, aten.full_like.default, aten.scalar_tensor.default, aten.clone.default)


def _readers_by_target() -> dict[Any, list[Reader]]:
    """All readers of each operation, in the order in which they are asked."""
    readers: dict[Any, list[Reader]] = {}
    parts = (_operands, _activation, _norm, _scale, _power_of_two, _ratio, _layout)
    for part in (_ANY_LABEL, *(part.READERS for part in parts)):
        for target, reader in part.items():
            readers.setdefault(target, []).append(reader)
    return readers


_READERS = _readers_by_target()
