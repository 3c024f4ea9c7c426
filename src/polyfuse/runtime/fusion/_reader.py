"""Reads a graph of ATen operations, front to back, into labels.

A reader gives a node's label from those of its arguments, or None for what it does not understand completely, so that
no label rests on a guess.
"""

from typing import Any

import torch
from torch.fx import Graph, Node

from polyfuse.runtime.fusion import _layout, _product, _scale
from polyfuse.runtime.fusion._graph import Args, Labels, Reader, dtype_of, is_number, rounded, same, sizes
from polyfuse.runtime.fusion._labels import Const, Half, Label, Moved

aten = torch.ops.aten


def read(graph: Graph) -> Labels:
    """The label of every node that has one."""
    labels: Labels = {}
    for node in graph.nodes:
        if node.op != "call_function" or (node.kwargs and node.target not in _WITH_KEYWORDS):
            continue
        for reader in _TABLE.get(node.target, ()):
            label = reader(node, node.args, labels)
            if label is not None:
                labels[node] = label
                break
    return labels


def _constant(node: Node, args: Args, labels: Labels) -> Label | None:
    value = args[-1]
    return Const(rounded(value, torch.float32)) if is_number(value) and dtype_of(node) is torch.float32 else None


def _view(node: Node, args: Args, labels: Labels) -> Label | None:
    label = labels.get(args[0])
    return None if isinstance(label, Moved) else label


def _alias(node: Node, args: Args, labels: Labels) -> Label | None:
    return labels.get(args[0])


def _clone(node: Node, args: Args, labels: Labels) -> Label | None:
    label = labels.get(args[0])
    return None if isinstance(label, Half) else label  # on a CPU the last bit of silu depends on its place in memory


def _copy(node: Node, args: Args, labels: Labels) -> Label | None:
    whole = same(sizes(node), sizes(args[1])) and dtype_of(node) is dtype_of(args[1])
    return _clone(node, args[1:], labels) if whole else None


_ANY: dict[Any, Reader] = {
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
_TABLES = (_ANY, _product.READERS, _scale.READERS, _layout.READERS)
_TABLE: dict[Any, list[Reader]] = {
    target: [table[target] for table in _TABLES if target in table] for table in _TABLES for target in table
}
