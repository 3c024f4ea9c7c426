"""Reads y = silu(gate) * up, and its product with the weights of rows."""

from typing import Any

import torch
from torch.fx import Node

from polyfuse.runtime.fusion._labels import Label
from polyfuse.runtime.fusion._nodes import Args, Labels, Reader, dtype_of, is_call, is_float, same, sizes
from polyfuse.runtime.fusion._values import Product, Scaled, Sigmoid, Silu, Statistic, Weighted

aten = torch.ops.aten


def _sigmoid(node: Node, args: Args, labels: Labels) -> Label | None:
    """The sigmoid of a gate, or of a number times it."""
    of = labels.operand(args[0])
    return Sigmoid(of, dtype_of(node)) if of and is_float(node) else None


def _silu(node: Node, args: Args, labels: Labels) -> Label | None:
    """SiLU of the gate, as one node in the gate's dtype."""
    gate = labels.operand(args[0])
    return Silu(gate, dtype_of(node)) if gate and is_float(node) else None


def _in_silu(node: Node) -> bool:
    """Whether a node is one of those that `torch.nn.functional.silu` was decomposed into."""
    return str(node.meta.get("original_aten")) == "aten.silu.default"  # not the same object


def _div(node: Node, args: Args, labels: Labels) -> Label | None:
    """SiLU of the gate as gate / (1 + exp(-gate))."""
    gate, one_plus_exp = args
    operand = labels.operand(gate)
    exp = one_plus_exp.args[0] if isinstance(one_plus_exp, Node) and one_plus_exp.args else None
    negated = exp.args[0] if isinstance(exp, Node) and exp.args else None
    is_silu = (
        is_call(one_plus_exp, aten.add.Tensor, exp, 1)
        and is_call(exp, aten.exp.default, negated)
        and is_call(negated, aten.neg.default, gate)
    )
    if not is_silu or not operand or not is_float(node):
        return None
    return Silu(operand, dtype_of(node), inexact="" if _in_silu(node) else "silu is written out, not torch's own")


def _mul(node: Node, args: Args, labels: Labels) -> Label | None:
    """SiLU of the gate as gate * sigmoid(alpha * gate), y, or y times a weight; the factors in either order."""
    for a, b in (args, args[::-1]):
        if not (isinstance(a, Node) and isinstance(b, Node)) or not is_float(node):
            continue
        alike = same(sizes(a), sizes(b))
        match labels.get(a), labels.operand(b):
            case Sigmoid(of, step), gate if gate == of and alike:
                return Silu(of, dtype_of(node)) if _in_silu(node) else Silu(of, dtype_of(node), steps=(step,))
            case Sigmoid(Scaled(of, alpha, inner), step), gate if gate == of and alike:
                return Silu(of, dtype_of(node), alpha, (inner, step))
            case Silu() as silu, up if up and alike:
                return Product(silu, up, dtype_of(node))
            case Product() as y, weight if weight and _is_weight(b, a, labels):
                return Weighted(y, weight, dtype_of(node))
    return None


def _is_weight(node: Node, y: Node, labels: Labels) -> bool:
    """Whether a node has a weight for each row of y, and is no root of a norm."""
    return not isinstance(labels.get(node), Statistic) and same(sizes(node), (*sizes(y)[:-1], 1))


READERS: dict[Any, Reader] = {
    aten.sigmoid.default: _sigmoid,
    aten.silu.default: _silu,
    aten.div.Tensor: _div,
    aten.mul.Tensor: _mul,
}
