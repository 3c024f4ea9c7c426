"""What the readers of a graph share: looking at nodes, shapes and numbers."""

from collections.abc import Callable
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import torch
from torch.fx import Node

from polyfuse.runtime.fusion._labels import Label

Labels: TypeAlias = dict[Node, Label]
Args: TypeAlias = tuple[Any, ...]
Reader: TypeAlias = Callable[[Node, Args, Labels], Label | None]
Sizes: TypeAlias = tuple[int | torch.SymInt, ...]

NARROW: dict[torch.dtype, Any] = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}


def sizes(node: Node) -> Sizes:
    """The shape of a node's value."""
    return tuple(node.meta["val"].shape)


def width_of(x: Node) -> int:
    """D, of a node with value x [..., 2*D]."""
    return x.meta["val"].shape[-1] // 2


def dtype_of(node: Node) -> torch.dtype:
    """The dtype of a node's value."""
    return node.meta["val"].dtype


def same(first: Sizes, second: Sizes) -> bool:
    """Whether two shapes, or strides, are equal for every size that the graph is compiled for."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(first) == len(second) and all(statically_known_true(a == b) for a, b in zip(first, second, strict=True))


def with_defaults(args: Args, *defaults: Any) -> Args:
    """The arguments of a node, with defaults for the last ones."""
    return *args, *defaults[len(args) :]


def is_number(value: Any) -> bool:
    """Whether an argument is a Python number."""
    return isinstance(value, int | float)


def is_call(value: Any, target: Any, *args: Any) -> bool:
    """Whether an argument is the node `target(*args)`."""
    return isinstance(value, Node) and value.target is target and value.args == args and not value.kwargs


def rounded(value: float, dtype: torch.dtype) -> float:
    """A number as a tensor of this dtype holds it."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
        return float(single.astype(NARROW[dtype]) if dtype in NARROW else single)
