"""Reads how scales are stored: as exponent bytes, and in a memory layout that transposes or pads them."""

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch.fx import Node

from polyfuse.runtime.fusion._labels import ExponentBytes, Label, Moved, Packed, Scale, Stage, Step
from polyfuse.runtime.fusion._nodes import Args, Labels, Reader, known, same, sizes, with_defaults

aten, prims = torch.ops.aten, torch.ops.prims

_MANTISSA_WIDTH = 23


def _groups(scale: Scale) -> Any:
    return sizes(scale.at)[-1] // scale.group_size


def _shift(node: Node, args: Args, labels: Labels) -> Label | None:
    """The exponents of a scale, shifted out of its bits."""
    match labels.get(args[0]):
        case Step(Stage.BITS, scale) if args[1] == _MANTISSA_WIDTH:
            return Step(Stage.EXPONENTS, scale)
    return None


def _convert(node: Node, args: Args, labels: Labels) -> Label | None:
    """The exponents as bytes."""
    match labels.get(args[0]):
        case Step(Stage.EXPONENTS, scale) if args[1] is torch.uint8:
            return ExponentBytes(scale)
    return None


def _view_as(node: Node, args: Args, labels: Labels) -> Label | None:
    """The exponent bytes as whole int32 words."""
    match labels.get(args[0]):
        case ExponentBytes(scale, padded) if args[1] is torch.int32 and (padded or known(_groups(scale) % 4 == 0)):
            return Packed(scale)
    return None


def _pad(node: Node, args: Args, labels: Labels) -> Label | None:
    """The exponent bytes with columns of zeros up to a whole word, or scales `[rows, columns]` with more rows."""
    source, amounts, value = with_defaults(args, None, None, 0.0)
    match labels.get(source), amounts:
        case ExponentBytes(scale, padded=False), [0, columns] if value == 0 and known(columns == -_groups(scale) % 4):
            return ExponentBytes(scale, padded=True) if same(sizes(source)[-1:], (_groups(scale),)) else None
        case (Scale() | Packed()) as label, [0, 0, 0, _] if len(sizes(source)) == 2:
            return Moved(label, (0, 1), padded=True)
    return None


def _slice(node: Node, args: Args, labels: Labels) -> Label | None:
    """The rows that were there before the padding."""
    source, dim, start, _, step = with_defaults(args, None, 0, None, None, 1)
    moved = labels.get(source)
    if not isinstance(moved, Moved) or moved.order[dim] != 0 or start not in (None, 0) or step != 1:
        return None
    rows = prod(sizes(moved.scale.at)[:-1])
    return _settled(replace(moved, padded=False)) if same((sizes(node)[dim],), (rows,)) else None


def _permute(node: Node, args: Args, labels: Labels) -> Label | None:
    """Scales with their dimensions in another order."""
    source, dims = args
    label = labels.get(source)
    if not isinstance(label, Scale | Packed | Moved):
        return None
    moved = label if isinstance(label, Moved) else Moved(label, tuple(range(len(dims))))
    return _settled(replace(moved, order=tuple(moved.order[dim] for dim in dims)))


def _settled(moved: Moved) -> Label:
    """The scale itself, if all is in its place again."""
    in_place = moved.order == tuple(range(len(moved.order))) and not moved.padded
    return moved.label if in_place else moved


READERS: dict[Any, Reader] = {
    aten.__rshift__.Scalar: _shift,
    aten.bitwise_right_shift.Tensor_Scalar: _shift,
    prims.convert_element_type.default: _convert,
    aten.view.dtype: _view_as,
    aten.constant_pad_nd.default: _pad,
    aten.slice.Tensor: _slice,
    aten.permute.default: _permute,
}
