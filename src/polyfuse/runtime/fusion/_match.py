"""From labels to calls of `silu_mul_block_quant`: which values the op would compute, and with which attributes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from polyfuse.runtime.fusion._labels import Quantised, Ratio
from polyfuse.runtime.fusion._nodes import NARROW, Labels, dtype_of, is_contiguous, rounded, same, sizes
from polyfuse.runtime.fusion._results import ScaleUses
from polyfuse.spec.block_quant import LARGEST_SCALE_MIN, LEAST_SCALE_MIN, QMAX, scale_floor

prims = torch.ops.prims


@dataclass(frozen=True)
class Match:
    """A call that computes the values of some nodes: `q` and `scale` are the nodes that it replaces."""

    x: Node
    attrs: dict[str, Any]
    q: list[Node]
    scale: list[Node]


@dataclass(frozen=True)
class NearMiss:
    """Something that is quantised like the op's q, and why the op is not put in its place."""

    reason: str


def find(labels: Labels, materialize: bool) -> tuple[list[Match], list[NearMiss]]:
    """The calls that a graph can be rewritten with, and the near misses."""
    nodes_of: dict[Quantised, list[Node]] = {}
    for node, label in labels.items():
        if isinstance(label, Quantised):
            nodes_of.setdefault(label, []).append(node)
    if not nodes_of:
        return [], []
    uses = ScaleUses(labels)
    matches: list[Match] = []
    near_misses: list[NearMiss] = []
    for label, nodes in nodes_of.items():
        result = _match(label, nodes, uses, materialize)
        if isinstance(result, Match):
            matches.append(result)
        else:
            near_misses.append(result)
    return matches, near_misses


def _match(label: Quantised, nodes: list[Node], uses: ScaleUses, materialize: bool) -> Match | NearMiss:
    ratio, scale = label.ratio, label.ratio.scale
    x, dtype = scale.y.x, str(label.dtype).removeprefix("torch.")
    reason = _other_function(label, dtype) or _other_roundings(ratio, materialize)
    if reason:
        return NearMiss(reason)
    source: Any = x.args[0] if x.target is prims.convert_element_type.default else x
    if dtype_of(source) in NARROW and dtype_of(x) is torch.float32:
        if materialize:
            return NearMiss(f"x is a {dtype_of(source)} tensor widened to float32, which the op would have to read")
        x = source
    q = [node for node in nodes if any(uses.labels.get(user) != label for user in node.users)]
    if not q:
        return NearMiss("q is not used")
    if not all(map(is_contiguous, q)):
        return NearMiss("q is not contiguous")
    kept, scale_min = uses.kept(scale)
    (packed, layout), places = uses.placement(kept, scale)
    scale_format = "ue8m0_packed" if packed else "ue8m0" if kept.power_of_two else "float32"
    if scale_min == rounded(scale_floor(dtype, None, scale_format), torch.float32):
        scale_min = None
    if not all(_has_known_shape(node, x) for node in (*q, *places)):
        return NearMiss("q or the scale is used in a shape with two sizes that are not those of x")
    attrs = {
        "group_size": scale.group_size,
        "quant_dtype": dtype,
        "scale_format": scale_format,
        "scale_layout": layout,
        "scale_ub": scale.high,
        "scale_min": scale_min,
        "limit": scale.y.silu.gate.high,
        "materialize": materialize,
        "reciprocal": scale.reciprocal,
    }
    return Match(x, attrs, q, places)


def _other_function(label: Quantised, dtype: str) -> str:
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


def _other_roundings(ratio: Ratio, materialize: bool) -> str:
    """Why the op's last bits may differ, or without `materialize` more than those; empty if they do not."""
    y, x_dtype = ratio.scale.y, dtype_of(ratio.scale.y.x)
    if not materialize:
        known = {y.silu.rounded, y.rounded} <= {x_dtype, torch.float32}
        return "" if known else "y is rounded to another dtype than x's"
    if (y.silu.rounded, y.rounded) != (x_dtype, x_dtype):
        return f"silu(gate) and the product are not rounded to {x_dtype}"
    computed = x_dtype if y.silu.gate.high is None else torch.float32
    if y.silu.computed is not computed:
        return f"silu is computed from {y.silu.computed}, by the op from {computed}"
    return y.silu.inexact or ratio.inexact


def _has_known_shape(node: Node, x: Node) -> bool:
    """Whether at most one size of a node is neither a number nor a size of x."""
    unknown = 0
    for size in sizes(node):
        if not isinstance(size, int) and not any(same((own,), (size,)) for own in sizes(x)):
            unknown += 1
    return unknown <= 1
