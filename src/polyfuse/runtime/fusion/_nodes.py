"""What the readers of a graph share: looking at nodes, their shapes and strides, and numbers."""

from collections.abc import Callable
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import torch
from torch.fx import Node

from polyfuse.runtime.fusion._labels import Label
from polyfuse.runtime.fusion._values import Operand, Source, Value

_LARGEST = float(np.finfo(np.float32).max)

aten, prims = torch.ops.aten, torch.ops.prims

Args: TypeAlias = tuple[Any, ...]
Sizes: TypeAlias = tuple[int | torch.SymInt, ...]

# The 16-bit dtypes of activations, with NumPy's of the same format.
NARROW: dict[torch.dtype, Any] = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}


class Labels(dict[Node, Label]):
    """The label of each node, and in `nodes` the nodes of each label in the order of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: dict[Label, list[Node]] = {}

    def __setitem__(self, node: Node, label: Label) -> None:
        super().__setitem__(node, label)
        self.nodes.setdefault(label, []).append(node)

    def operand(self, node: Any) -> Operand | None:
        """A tensor that something is computed from: one that is itself computed counts as the first node with it.

        Labels would otherwise grow with the graph, and those with two operands like a tree.
        """
        label = self.get(node)
        if label is None or isinstance(label, Operand):
            return label
        return Source(self.nodes[label][0]) if isinstance(label, Value) else None

    def having(self, operand: Operand) -> list[Node]:
        """The nodes with the value of an operand."""
        return self.nodes.get(self[operand.node] if isinstance(operand, Source) else operand, [])


Reader: TypeAlias = Callable[[Node, Args, Labels], Label | None]


def sizes(node: Node) -> Sizes:
    """The shape of a node's value."""
    return tuple(node.meta["val"].shape)


def dtype_of(node: Node) -> torch.dtype:
    """The dtype of a node's value."""
    return node.meta["val"].dtype


def is_float(node: Node) -> bool:
    """Whether a node's value is a tensor of a dtype that the ops take."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (value.dtype is torch.float32 or value.dtype in NARROW)


def last_size(node: Node) -> int | None:
    """The last dimension of a value, also where its fake value has a symbol for a number that a view is given."""
    size: Any = sizes(node)[-1] if sizes(node) else 0
    if isinstance(size, int):
        return size or None
    args: Args = node.args
    if node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        wanted = args[1][-1]
        return wanted if isinstance(wanted, int) and wanted > 0 else None
    same_shape = node.target in (aten.abs.default, prims.convert_element_type.default)
    return last_size(args[0]) if same_shape else None


def same(first: Sizes, second: Sizes) -> bool:
    """Whether two shapes, or strides, are equal for every size that the graph is compiled for."""
    return len(first) == len(second) and all(known(a == b) for a, b in zip(first, second, strict=True))


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition holds for every size that the graph is compiled for."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def with_defaults(args: Args, *defaults: Any) -> Args:
    """The arguments of a node, with the last of `defaults` in the place of those that it leaves out."""
    return *args, *defaults[len(args) :]


def contiguous_strides(node: Node) -> Sizes:
    """The strides of a contiguous tensor of a node's shape."""
    strides: list[Any] = [1]
    for size in reversed(sizes(node)[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)


def is_contiguous(node: Node) -> bool:
    """Whether a value's elements lie in row-major order; the stride of a size of 1 does not matter."""
    for size, stride, wanted in zip(sizes(node), node.meta["val"].stride(), contiguous_strides(node), strict=True):
        if not same((size,), (1,)) and not same((stride,), (wanted,)):
            return False
    return True


def is_number(value: Any) -> bool:
    """Whether a node's argument is a Python number that is finite in float32."""
    return isinstance(value, int | float) and abs(value) <= _LARGEST


def is_call(value: Any, target: Any, *args: Any) -> bool:
    """Whether a node's argument is the node `target(*args)`."""
    return isinstance(value, Node) and value.target is target and value.args == args and not value.kwargs


def rounded(value: float, dtype: torch.dtype) -> float:
    """A number as a tensor of this dtype holds it."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
        return float(single.astype(NARROW[dtype]) if dtype in NARROW else single)
