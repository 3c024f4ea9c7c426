"""From labels to calls of `silu_mul_block_quant`: which values the op would compute, and with which attributes."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from polyfuse.runtime.fusion._graph import NARROW, Labels, Sizes, dtype_of, rounded, same, sizes, width_of
from polyfuse.runtime.fusion._labels import Label, Packed, Quantised, Ratio, Scale, scale_of
from polyfuse.spec.silu_mul_block_quant import (
    LARGEST_SCALE_MIN,
    LEAST_DIVISOR,
    LEAST_SCALE_MIN,
    QMAX,
    SCALE_LAYOUTS,
    scale_floor,
    scale_strides,
)

prims = torch.ops.prims


@dataclass(frozen=True)
class Match:
    """A call that computes the values of some nodes: `q` and `scale` are the nodes that it replaces."""

    x: Node
    attrs: dict[str, Any]
    q: list[Node]
    scale: list[Node]


class _Families:
    """The labelled nodes of a graph, and those made from each scale, in the order of the graph."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.of: dict[Scale | None, list[Node]] = {}
        for node, label in labels.items():
            self.of.setdefault(scale_of(label), []).append(node)

    def scale(self, node: Node) -> Scale | None:
        return scale_of(self.labels.get(node))


def find(labels: Labels, materialize: bool) -> tuple[list[Match], list[str]]:
    """The calls that a graph can be rewritten with, and for each q that none computes the reason."""
    found: dict[Quantised, list[Node]] = {}
    for node, label in labels.items():
        if isinstance(label, Quantised):
            found.setdefault(label, []).append(node)
    if not found:
        return [], []
    families = _Families(labels)
    results = [_match(label, nodes, families, materialize) for label, nodes in found.items()]
    return [r for r in results if isinstance(r, Match)], [r for r in results if isinstance(r, str)]


def _match(label: Quantised, nodes: list[Node], families: _Families, materialize: bool) -> Match | str:
    ratio, scale = label.ratio, label.ratio.scale
    x, dtype = scale.y.x, str(label.dtype).removeprefix("torch.")
    reason = _difference(label, dtype) or _rounding(ratio, materialize)
    if reason:
        return reason
    source: Any = x.args[0] if x.target is prims.convert_element_type.default else x
    if dtype_of(source) in NARROW and dtype_of(x) is torch.float32:
        if materialize:
            return f"x is a {dtype_of(source)} tensor widened to float32, which the op would have to read"
        x = source
    q = [node for node in nodes if any(families.labels.get(user) != label for user in node.users)]
    if not q:
        return "q is not used"
    if not all(map(_is_contiguous, q)):
        return "q is not contiguous"
    kept, scale_min = _kept(scale, families)
    if scale_min == rounded(scale_floor(dtype), torch.float32):
        scale_min = None
    packed, layout, places = _places(kept, scale, families)
    if not all(_has_known_shape(node, x) for node in (*q, *places)):
        return "q or the scale is used in a shape with two sizes that are not those of x"
    attrs = {
        "group_size": scale.group_size,
        "quant_dtype": dtype,
        "scale_format": "ue8m0_packed" if packed else "ue8m0" if kept.power_of_two else "float32",
        "scale_layout": layout,
        "scale_ub": scale.high,
        "scale_min": scale_min,
        "limit": scale.y.silu.gate.high,
        "materialize": materialize,
        "reciprocal": scale.reciprocal,
    }
    return Match(x, attrs, q, places)


def _difference(label: Quantised, dtype: str) -> str:
    """Why the values are not what the op computes, whatever it rounds; empty if they are."""
    ratio, scale, qmax = label.ratio, label.ratio.scale, QMAX[dtype]
    if scale.divisor != qmax:
        return f"amax is divided by {scale.divisor:g}, which is not {qmax:g} for {dtype}"
    if scale.low is None or not LEAST_SCALE_MIN <= scale.low <= LARGEST_SCALE_MIN:
        return "the scale has no lower bound, or one outside the normal float32 range"
    if ratio.rounded != (dtype == "int8") or (ratio.nan_is_zero and dtype != "int8"):
        return f"y / scale is not rounded as {dtype} needs it"
    bounds = (-qmax, qmax)
    if scale.high is None:  # then |y / scale| is at most qmax by itself, but for a rounding that q does not show
        inside = (ratio.low is None or ratio.low <= -qmax) and (ratio.high is None or ratio.high >= qmax)
    else:
        inside = (ratio.low, ratio.high) == bounds
    return "" if inside else f"y / scale is not clamped to {bounds}"


def _rounding(ratio: Ratio, materialize: bool) -> str:
    """Why the op's last bits may differ, or without `materialize` more than those; empty if they do not."""
    y, x_dtype = ratio.scale.y, dtype_of(ratio.scale.y.x)
    if materialize:
        computed = x_dtype if y.silu.gate.high is None else torch.float32
        if (y.silu.rounded, y.rounded) != (x_dtype, x_dtype):
            return f"silu(gate) and the product are not rounded to {x_dtype}"
        if y.silu.computed is not computed:
            return f"silu is computed from {y.silu.computed}, by the op from {computed}"
        return y.silu.inexact or ratio.inexact
    return "" if {y.silu.rounded, y.rounded} <= {x_dtype, torch.float32} else "y is rounded to another dtype than x's"


def _kept(divisor: Scale, families: _Families) -> tuple[Scale, float | None]:
    """Which scale is the op's result, and its scale_min: the divisor of y, or that without its lower bound."""
    raw = replace(divisor, low=None)
    if divisor.low == rounded(LEAST_DIVISOR, torch.float32) and not divisor.power_of_two:
        used = {scale: _used(families.of.get(scale, []), (raw, divisor), families) for scale in (raw, divisor)}
        if used[raw] and not used[divisor]:
            return raw, 0.0
    return divisor, divisor.low


def _used(nodes: list[Node], scales: tuple[Scale, ...], families: _Families) -> list[Node]:
    """The scales among the nodes that something other than these scales and their quotients uses."""
    return [
        node
        for node in nodes
        if not isinstance(families.labels[node], Quantised)
        and any(families.scale(user) not in scales for user in node.users)
    ]


def _places(kept: Scale, divisor: Scale, families: _Families) -> tuple[bool, str, list[Node]]:
    """(whether packed, layout, nodes) of the scales that the op's result replaces.

    If all that is used of the scales has one form, that is the op's; else float32 values in rows, from which the graph
    goes on to compute the others.
    """
    family = families.of.get(kept, []) + (families.of.get(divisor, []) if divisor != kept else [])
    used = _used(family, (kept, divisor), families)
    forms = {node: _form(node, families.labels[node], kept) for node in family}
    wanted = {forms[node] for node in used}
    form = wanted.pop() if len(wanted) == 1 else None
    if form is not None:
        return *form, used
    plain = (False, "row_major")

    def reads_rows(user: Node) -> bool:
        label = families.labels.get(user)
        return forms.get(user) == plain or isinstance(label, Ratio) or (label == divisor and divisor != kept)

    return *plain, [n for n in family if forms[n] == plain and not all(map(reads_rows, n.users))]


def _has_known_shape(node: Node, x: Node) -> bool:
    """Whether at most one size of a node is neither a number nor a size of x."""
    unknown = [s for s in sizes(node) if not isinstance(s, int) and not any(same((own,), (s,)) for own in sizes(x))]
    return len(unknown) <= 1


def _form(node: Node, label: Label, kept: Scale) -> tuple[bool, str] | None:
    """(whether packed, layout) of a node that has the op's scales; None for other nodes and other layouts."""
    if label not in (kept, Packed(kept)):
        return None
    packed = isinstance(label, Packed)
    groups = width_of(kept.y.x) // kept.group_size
    lead, columns = sizes(kept.y.x)[:-1], -(-groups // 4) if packed else groups
    if same(sizes(node), (*lead, columns)):
        strides = tuple(node.meta["val"].stride())
        for layout in SCALE_LAYOUTS:
            if same(strides, scale_strides(lead, columns, layout, False) or _contiguous(node)):
                return packed, layout
    return (packed, "row_major") if _is_contiguous(node) else None


def _contiguous(node: Node) -> Sizes:
    """The strides of a contiguous tensor of a node's shape."""
    strides: list[Any] = [1]
    for size in reversed(sizes(node)[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)


def _is_contiguous(node: Node) -> bool:
    """Whether the elements lie in row-major order; the stride of a size of 1 does not matter."""
    steps = zip(sizes(node), node.meta["val"].stride(), _contiguous(node), strict=True)
    return all(same((size,), (1,)) or same((stride,), (wanted,)) for size, stride, wanted in steps)
