"""Puts calls of the quantising ops into a graph."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node, map_arg

from polyfuse.dispatch import _torch_library
from polyfuse.dispatch._plan import CALLS
from polyfuse.runtime.fusion._match import Match, NearMiss, find
from polyfuse.runtime.fusion._nodes import dtype_of, rounded, same, sizes
from polyfuse.runtime.fusion._reader import read

NAMES = ("silu_mul_block_quant", "rms_norm_block_quant", "block_quant")
PLACED = "polyfuse_fusion"  # in the meta of a node that the pass put there: what it computes

aten = torch.ops.aten


def is_inference(graph: Graph) -> bool:
    """Whether a graph computes no gradient and keeps nothing for one."""
    names = (str(node.target) for node in graph.find_nodes(op="placeholder"))
    return not any(name.startswith(("primals", "tangents")) for name in names)


def fuse(graph: Graph, materialize: bool) -> tuple[list[Match], list[NearMiss]]:
    """Rewrite a graph in place; gives what was replaced, and what is almost a match."""
    matches, near_misses = find(read(graph), materialize)
    if matches:
        order = {node: i for i, node in enumerate(graph.nodes)}
        now: dict[Node, Node] = {}  # what an earlier match has put in the place of a node
        for match in matches:
            results = _available(match, order)
            first = min((node for places in results for node in places), key=order.__getitem__)
            now |= _replace(graph, match, results, first, now)
        for match in matches:
            _erase_unused(graph, [node for places in match.results for node in places])
    return matches, near_misses


def _available(match: Match, order: dict[Node, int]) -> tuple[Sequence[Node], ...]:
    """What a call's results replace: not a sum that is there before all that the op needs."""
    needed = max(order.get(node, -1) for node in match.tensors.values())
    return tuple([node for node in places if order[node] > needed] for places in match.results)


def _replace(
    graph: Graph, match: Match, results: tuple[Sequence[Node], ...], first: Node, now: Mapping[Node, Node]
) -> dict[Node, Node]:
    """Put the op's call before `first`, the first node that it replaces, and its results in their places."""
    op, replaced = CALLS[match.op], {}
    x = match.tensors["x"]
    with graph.inserting_before(first), x.meta["val"].fake_mode:
        tensors = {name: _fitting(graph, name, now.get(node, node), x) for name, node in match.tensors.items()}
        values = {**op.spec.parameters, **match.attrs, **tensors}
        target = getattr(torch.ops.polyfuse, match.op).default
        call = _call(graph, target, *_torch_library.flatten(op, tuple(values[name] for name in op.names)))
        call.meta[PLACED] = _description(match)
        for index, places in enumerate(results):
            result = _call(graph, operator.getitem, call, index)
            for place in places:
                replaced[place] = _shaped(graph, result, place, x)
                place.replace_all_uses_with(replaced[place])
    return replaced


def _fitting(graph: Graph, name: str, node: Node, x: Node) -> Node:
    """A tensor as the op takes it: weights of rows [..., 1] without their last dimension."""
    if name == "row_weight" and len(sizes(node)) == len(sizes(x)):
        return _call(graph, aten.squeeze.dim, node, -1)
    return node


def _erase_unused(graph: Graph, nodes: list[Node]) -> None:
    """Erase those of the nodes that nothing uses any more, and what was computed for them alone."""
    erased: set[Node] = set()
    while nodes:
        node = nodes.pop()
        if node.op == "call_function" and not node.users and node not in erased and not node.is_impure():
            nodes += node.all_input_nodes
            erased.add(node)
            graph.erase_node(node)


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    """A new node, with its fake value."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*map_arg(args, lambda argument: argument.meta["val"]))
    return node


def _shaped(graph: Graph, result: Node, place: Node, x: Node) -> Node:
    """The result in the shape of the node whose place it takes, of which one size may be unknown."""
    if same(sizes(result), sizes(place)):
        return result
    shape: list[int | Node] = []
    for size in sizes(place):
        if isinstance(size, int):
            shape.append(size)
            continue
        dims_of_x = [dim for dim, own in enumerate(sizes(x)) if same((own,), (size,))]
        shape.append(_call(graph, aten.sym_size.int, x, dims_of_x[0]) if dims_of_x else -1)
    return _call(graph, aten.view.default, result, shape)


def _description(match: Match) -> dict[str, Any]:
    """What a call computes: op, shape and dtype of x, other tensors, and attributes that are not the op's defaults."""
    defaults, x = CALLS[match.op].spec.parameters, match.tensors["x"]
    attrs = {name: value for name, value in match.attrs.items() if not _is_default(value, defaults[name])}
    others = {"tensors": [name for name in match.tensors if name != "x"]} if len(match.tensors) > 1 else {}
    return {"op": match.op, "shape": [str(size) for size in sizes(x)], "dtype": str(dtype_of(x)), **others, **attrs}


def _is_default(value: Any, default: Any) -> bool:
    """Whether an attribute is the op's default, which a number also is as the float32 nearest to it."""
    return bool(value == default or (isinstance(default, float) and value == rounded(default, torch.float32)))
