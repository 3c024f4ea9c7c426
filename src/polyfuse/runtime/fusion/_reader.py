"""Reads a graph of ATen operations, front to back, into labels.

A reader gives a node's label from those of its arguments, or None for what it does not understand completely, so that
no label rests on a guess. Several readers may know an operation; the first label holds.
"""

from typing import Any

import torch
from torch.fx import Graph, Node

from polyfuse.runtime.fusion import _layout, _power_of_two, _product, _ratio, _scale
from polyfuse.runtime.fusion._labels import Const, Half, Label, Moved
from polyfuse.runtime.fusion._nodes import Args, Labels, Reader, dtype_of, is_number, rounded, same, sizes

aten = torch.ops.aten


def read(graph: Graph) -> Labels:
    """The label of every node that has one."""
    labels: Labels = {}
    for node in graph.nodes:
        if node.op != "call_function" or (node.kwargs and node.target not in _WITH_KEYWORDS):
            continue
        for reader in _READERS.get(node.target, ()):
            label = reader(node, node.args, labels)
            if label is not None:
                labels[node] = label
                break
    return labels


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
    """A copy, but of gate or up: on a CPU the last bit of silu depends on where in memory its argument lies."""
    label = labels.get(args[0])
    return None if isinstance(label, Half) else label


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
_WITH_KEYWORDS = (aten.full.default, aten.full_like.default, aten.scalar_tensor.default, aten.clone.default)


def _readers_by_target() -> dict[Any, list[Reader]]:
    """All readers of each operation, in the order in which they are asked."""
    readers: dict[Any, list[Reader]] = {}
    for part in (_ANY_LABEL, _product.READERS, _scale.READERS, _power_of_two.READERS, _ratio.READERS, _layout.READERS):
        for target, reader in part.items():
            readers.setdefault(target, []).append(reader)
    return readers


_READERS = _readers_by_target()
