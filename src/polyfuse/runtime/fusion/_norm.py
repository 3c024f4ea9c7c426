"""Reads root-mean-square normalisation: h / sqrt(mean(h * h) + eps), times a weight for each column."""

from typing import Any

import torch
from torch.fx import Node

from polyfuse.runtime.fusion._labels import Label
from polyfuse.runtime.fusion._nodes import (
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
from polyfuse.runtime.fusion._values import Moment, Normalised, Normed, Statistic

aten = torch.ops.aten


def _square(node: Node, args: Args, labels: Labels) -> Label | None:
    """h * h in float32, as a power."""
    h = labels.operand(args[0])
    return Statistic(Moment.SQUARES, h, node) if h and args[1] == 2 and dtype_of(node) is torch.float32 else None


def _mean(node: Node, args: Args, labels: Labels) -> Label | None:
    """The mean of the squares of a row, one for each row."""
    source, dims, keep = with_defaults(args, None, [], False)
    match labels.get(source):
        case Statistic(Moment.SQUARES, h) if keep and dims in ([-1], [len(sizes(source)) - 1]):
            return Statistic(Moment.MEAN, h, source)
    return None


def _add(node: Node, args: Args, labels: Labels) -> Label | None:
    """The mean plus eps; the terms in either order."""
    for term, number in (args[:2], args[1::-1]):
        match labels.get(term):
            case Statistic(Moment.MEAN, h, rows) if is_number(number):
                return Statistic(Moment.WITH_EPS, h, rows, rounded(number, torch.float32))
    return None


def _root(node: Node, args: Args, labels: Labels) -> Label | None:
    """The root, or one over it."""
    match labels.get(args[0]):
        case Statistic(Moment.WITH_EPS, h, rows, eps):
            return Statistic(Moment.ROOT if node.target is aten.sqrt.default else Moment.INVERSE, h, rows, eps)
    return None


def _div(node: Node, args: Args, labels: Labels) -> Label | None:
    """h over its root."""
    above, below = args
    match labels.operand(above), labels.get(below):
        case h, Statistic(Moment.ROOT, of, rows, eps) if h == of and _is_of_rows(below, above):
            return Normalised(of, rows, eps, dtype_of(node))
    return None


def _mul(node: Node, args: Args, labels: Labels) -> Label | None:
    """h * h, h times its inverse root, or normalised rows times a weight; the factors in either order."""
    for a, b in (args, args[::-1]):
        if not (isinstance(a, Node) and isinstance(b, Node)) or not is_float(node):
            continue
        match labels.operand(a), labels.get(b):
            case h, _ if h and a is b and dtype_of(node) is torch.float32:
                return Statistic(Moment.SQUARES, h, node)
            case h, Statistic(Moment.INVERSE, of, rows, eps) if h == of and _is_of_rows(b, a):
                return Normalised(of, rows, eps, dtype_of(node))
            case weight, Normalised() as normalised if weight and _is_of_columns(a, b):
                return Normed(normalised, weight, dtype_of(node))
    return None


def _is_of_rows(statistic: Node, h: Node) -> bool:
    """Whether there is one number for each row of h."""
    return same(sizes(statistic), (*sizes(h)[:-1], 1))


def _is_of_columns(weight: Node, rows: Node) -> bool:
    """Whether there is one number for each column of the rows."""
    *lead, columns = sizes(weight) or (0,)
    return all(size == 1 for size in lead) and same((columns,), sizes(rows)[-1:])


READERS: dict[Any, Reader] = {
    aten.pow.Tensor_Scalar: _square,
    aten.mean.dim: _mean,
    aten.add.Tensor: _add,
    aten.add.Scalar: _add,
    aten.sqrt.default: _root,
    aten.rsqrt.default: _root,
    aten.div.Tensor: _div,
    aten.mul.Tensor: _mul,
}
