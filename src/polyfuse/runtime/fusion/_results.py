"""Which scales of a graph are the op's result, in which form it gives them, and which nodes they replace."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from polyfuse.runtime.fusion._labels import Label, Packed, Quantised, Ratio, Scale, scale_of
from polyfuse.runtime.fusion._nodes import Labels, contiguous_strides, is_contiguous, rounded, same, sizes
from polyfuse.spec.block_quant import LEAST_DIVISOR, SCALE_LAYOUTS, scale_strides


class ScaleForm(NamedTuple):
    """How scales are stored: whether packed, and in which of the op's layouts."""

    packed: bool
    layout: str


PLAIN = ScaleForm(packed=False, layout="row_major")


class KeptScale(NamedTuple):
    """The scale that is the op's result, and its `scale_min`."""

    scale: Scale
    scale_min: float | None


class Placement(NamedTuple):
    """In which form the op gives its scales, and the nodes that they replace."""

    form: ScaleForm
    nodes: list[Node]


class ScaleUses:
    """The nodes of a graph by the scale that they are or were made from, in the order of the graph."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self._made_from: dict[Scale | None, list[Node]] = {}
        for node, label in labels.items():
            self._made_from.setdefault(scale_of(label), []).append(node)

    def kept(self, divisor: Scale) -> KeptScale:
        """Which scale is the op's result: the divisor of y, or that before it was given its lower bound.

        The latter if the graph uses it and not the divisor, and the bound is just the one that the op itself divides
        by at least; `scale_min` is then 0.
        """
        unbounded = replace(divisor, low=None)
        if divisor.low == rounded(LEAST_DIVISOR, torch.float32) and not divisor.power_of_two:
            both = (unbounded, divisor)
            uses_divisor = self._used_outside(self._made_from.get(divisor, []), both)
            if self._used_outside(self._made_from.get(unbounded, []), both) and not uses_divisor:
                return KeptScale(unbounded, 0.0)
        return KeptScale(divisor, divisor.low)

    def placement(self, kept: Scale, divisor: Scale) -> Placement:
        """What the op's scales replace.

        If all that is used of the scales has one form, that is the op's; else it gives float32 values in rows, from
        which the graph goes on to compute the others.
        """
        family = list(self._made_from.get(kept, []))
        if divisor != kept:
            family += self._made_from.get(divisor, [])
        used = self._used_outside(family, (kept, divisor))
        forms = {node: _form(node, self.labels[node], kept) for node in family}
        wanted = {forms[node] for node in used}
        if len(wanted) == 1:
            (form,) = wanted
            if form is not None:
                return Placement(form, used)

        def reads_rows(user: Node) -> bool:
            label = self.labels.get(user)
            return forms.get(user) == PLAIN or isinstance(label, Ratio) or (label == divisor and divisor != kept)

        ends = [node for node in family if forms[node] == PLAIN and not all(map(reads_rows, node.users))]
        return Placement(PLAIN, ends)

    def _used_outside(self, nodes: list[Node], scales: tuple[Scale, ...]) -> list[Node]:
        """Those of the nodes, but q, that something other than what is made from these scales uses."""
        found = []
        for node in nodes:
            users = (scale_of(self.labels.get(user)) for user in node.users)
            if not isinstance(self.labels[node], Quantised) and any(scale not in scales for scale in users):
                found.append(node)
        return found


def _form(node: Node, label: Label, kept: Scale) -> ScaleForm | None:
    """The form of a node that has the op's scales; None for other nodes and other layouts."""
    if label not in (kept, Packed(kept)):
        return None
    packed = isinstance(label, Packed)
    *lead, width = sizes(kept.at)
    groups: Any = width // kept.group_size
    columns = -(-groups // 4) if packed else groups
    if same(sizes(node), (*lead, columns)):
        strides = tuple(node.meta["val"].stride())
        for layout in SCALE_LAYOUTS:
            if same(strides, scale_strides(tuple(lead), columns, layout, False) or contiguous_strides(node)):
                return ScaleForm(packed, layout)
    return ScaleForm(packed, "row_major") if is_contiguous(node) else None
