"""From labels to calls of the quantising ops: which values an op would compute, and with which attributes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from polyfuse.runtime.fusion._calls import call_for
from polyfuse.runtime.fusion._labels import Quantised
from polyfuse.runtime.fusion._nodes import Labels, is_contiguous, rounded, same, sizes
from polyfuse.runtime.fusion._ratio import DTYPES
from polyfuse.runtime.fusion._results import ScaleUses
from polyfuse.runtime.fusion._values import Value, near_of
from polyfuse.spec.block_quant import LARGEST_SCALE_MIN, LEAST_SCALE_MIN, QMAX, scale_floor

prims = torch.ops.prims


@dataclass(frozen=True)
class Match:
    """A call that computes the values of some nodes: `results` has for each result the nodes that it replaces."""

    op: str
    tensors: dict[str, Node]
    attrs: dict[str, Any]
    results: tuple[Sequence[Node], ...]


@dataclass(frozen=True)
class NearMiss:
    """Something that is quantised almost like the op's q, or made like its y, and why the op is not in its place."""

    reason: str


def find(labels: Labels, materialize: bool) -> tuple[list[Match], list[NearMiss]]:
    """The calls that a graph can be rewritten with, and the near misses."""
    reasons = [_unread(node, label) for node, label in labels.items() if isinstance(label, Value)]
    near_misses = [NearMiss(reason) for reason in reasons if reason]
    matches: list[Match] = []
    uses = ScaleUses(labels)
    for label, same_q in labels.nodes.items():
        if isinstance(label, Quantised):
            match, reason = _match(label, same_q, uses, materialize)
            matches += [match] if match else []
            near_misses += [NearMiss(reason)] if reason else []
    return matches, near_misses


def _unread(node: Node, label: Value) -> str:
    """Why a value in a quantised dtype is no q that the pass knows; empty if it is not what one quantises to."""
    if node.target is not prims.convert_element_type.default or node.args[1] not in DTYPES:
        return ""
    near = near_of(label)
    if near and near.scaled:
        return near.reason
    dtype = str(node.args[1]).removeprefix("torch.")
    return "" if dtype == "int8" else f"what becomes {dtype} is not divided by a scale of groups of its columns"


def _match(label: Quantised, same_q: list[Node], uses: ScaleUses, materialize: bool) -> tuple[Match | None, str]:
    """The call for a q, and why it is none, or none of an op that computes more."""
    ratio, scale = label.ratio, label.ratio.scale
    dtype = str(label.dtype).removeprefix("torch.")
    reason = _other_function(label, dtype) or (ratio.inexact if materialize else "")
    if reason:
        return None, reason
    q = [node for node in same_q if any(uses.labels.get(user) != label for user in node.users)]
    if not q:
        return None, "q is not used"
    if not all(map(is_contiguous, q)):
        return None, "q is not contiguous"
    kept, scale_min = uses.kept(scale)
    (packed, layout), places = uses.placement(kept, scale)
    scale_format = "ue8m0_packed" if packed else "ue8m0" if kept.power_of_two else "float32"
    if scale_min == rounded(scale_floor(dtype, None, scale_format), torch.float32):
        scale_min = None
    call, reason = call_for(scale.y, scale.at, uses.labels, materialize)
    x = call.tensors["x"]
    if not all(_has_known_shape(node, x) for node in (*q, *places)):
        return None, "q or the scale is used in a shape with two sizes that are not those of x"
    attrs = {
        "group_size": scale.group_size,
        "quant_dtype": dtype,
        "scale_format": scale_format,
        "scale_layout": layout,
        "scale_ub": scale.high,
        "scale_min": scale_min,
        "reciprocal": scale.reciprocal,
    }
    results = (q, places) if call.sum is None else (q, places, [call.sum])
    return Match(call.op, call.tensors, call.attrs | attrs, results), reason


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


def _has_known_shape(node: Node, x: Node) -> bool:
    """Whether at most one size of a node is neither a number nor a size of x."""
    unknown = 0
    for size in sizes(node):
        if not isinstance(size, int) and not any(same((own,), (size,)) for own in sizes(x)):
            unknown += 1
    return unknown <= 1
