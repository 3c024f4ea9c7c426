"""Puts calls of `torch.ops.polyfuse.silu_mul_block_quant` into a graph."""

import operator
from typing import Any

import torch
from torch.fx import Graph, Node, map_arg

from polyfuse.dispatch import _torch_library
from polyfuse.dispatch._plan import CALLS
from polyfuse.runtime.fusion._match import Match, NearMiss, find
from polyfuse.runtime.fusion._nodes import dtype_of, same, sizes
from polyfuse.runtime.fusion._reader import read

NAME = "silu_mul_block_quant"
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
        for match in matches:
            _replace(graph, match, min((*match.q, *match.scale), key=order.__getitem__))
        for match in matches:
            _erase_unused(graph, [*match.q, *match.scale])
    return matches, near_misses


def _replace(graph: Graph, match: Match, first: Node) -> None:
    """Put the op's call before `first`, the first node that it replaces, and its results in their places."""
    op = CALLS[NAME]
    values = {**op.spec.parameters, **match.attrs, "x": match.x}
    with graph.inserting_before(first), match.x.meta["val"].fake_mode:
        target = getattr(torch.ops.polyfuse, NAME).default
        call = _call(graph, target, *_torch_library.flatten(op, tuple(values[name] for name in op.names)))
        call.meta[PLACED] = _description(match)
        for index, places in enumerate((match.q, match.scale)):
            result = _call(graph, operator.getitem, call, index)
            for place in places:
                place.replace_all_uses_with(_shaped(graph, result, place, match.x))


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
    """What a call computes: shape and dtype of x, and the attributes that are not the op's defaults."""
    defaults = CALLS[NAME].spec.parameters
    attrs = {name: value for name, value in match.attrs.items() if value != defaults[name]}
    return {"shape": [str(size) for size in sizes(match.x)], "dtype": str(dtype_of(match.x)), **attrs}
