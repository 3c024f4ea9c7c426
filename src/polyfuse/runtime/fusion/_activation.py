"""Reads y = silu(gate) * up, and its product with the weights of rows."""

from typing import Any, TypeGuard

import torch
from torch.fx import Node

from polyfuse.runtime.fusion._labels import Label
from polyfuse.runtime.fusion._nodes import Args, Labels, Reader, dtype_of, is_call, is_float, same, sizes
from polyfuse.runtime.fusion._values import Product, Scaled, Sigmoid, Silu, Statistic, Value, Weighted

aten = torch.ops.aten


def _sigmoid(node: Node, args: Args, labels: Labels) -> Label | None:
    """The sigmoid of a gate, or of a number times it."""
    label = labels.get(args[0])
    return Sigmoid(label, dtype_of(node)) if isinstance(label, Value) and is_float(node) else None


def _silu(node: Node, args: Args, labels: Labels) -> Label | None:
    """SiLU of the gate, as one node in the gate's dtype."""
    gate = labels.get(args[0])
    return Silu(gate, dtype_of(node)) if isinstance(gate, Value) and is_float(node) else None


def _in_silu(node: Node) -> bool:
    """Whether a node is one of those that `torch.nn.functional.silu` was decomposed into."""
    return str(node.meta.get("original_aten")) == "aten.silu.default"  # not the same object


def _div(node: Node, args: Args, labels: Labels) -> Label | None:
    """SiLU of the gate as gate / (1 + exp(-gate))."""
    gate, one_plus_exp = args
    label = labels.get(gate)
    exp = one_plus_exp.args[0] if isinstance(one_plus_exp, Node) and one_plus_exp.args else None
    negated = exp.args[0] if isinstance(exp, Node) and exp.args else None
    is_silu = (
        is_call(one_plus_exp, aten.add.Tensor, exp, 1)
        and is_call(exp, aten.exp.default, negated)
        and is_call(negated, aten.neg.default, gate)
    )
    if not is_silu or not isinstance(label, Value) or not is_float(node):
        return None
    return Silu(label, dtype_of(node), inexact="" if _in_silu(node) else "silu is written out, not torch's own")


def _mul(node: Node, args: Args, labels: Labels) -> Label | None:
    """SiLU of the gate as gate * sigmoid(alpha * gate), y, or y times a weight; the factors in either order."""
    for a, b in (args, args[::-1]):
        if not (isinstance(a, Node) and isinstance(b, Node)) or not is_float(node):
            continue
        match labels.get(a), labels.get(b):
            case gate, Sigmoid(of, step) if gate == of and same(sizes(a), sizes(b)):
                return Silu(of, dtype_of(node)) if _in_silu(node) else Silu(of, dtype_of(node), steps=(step,))
            case gate, Sigmoid(Scaled(of, alpha, inner), step) if gate == of and same(sizes(a), sizes(b)):
                return Silu(of, dtype_of(node), alpha, (inner, step))
            case Silu() as silu, up if isinstance(up, Value) and same(sizes(a), sizes(b)):
                return Product(silu, up, dtype_of(node))
            case Product() as y, weight if _is_of_rows(weight, b, a):
                return Weighted(y, weight, dtype_of(node))
    return None


def _is_of_rows(label: Label | None, weight: Node, y: Node) -> TypeGuard[Value]:
    """Whether a value is a weight for each row of y, and no root of a norm."""
    return isinstance(label, Value) and not isinstance(label, Statistic) and same(sizes(weight), (*sizes(y)[:-1], 1))


READERS: dict[Any, Reader] = {
    aten.sigmoid.default: _sigmoid,
    aten.silu.default: _silu,
    aten.div.Tensor: _div,
    aten.mul.Tensor: _mul,
}
