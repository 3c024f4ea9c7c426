"""A conformance case: a call of an op described as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One call of an op, from which seeded inputs are made.

    `dims` gives the dimensions that `attrs` and `host` do not determine. `host` holds the literal values
    of host arguments; those also named in `as_tensor` are passed as tensors. `present` lists the optional
    arrays to pass, and `split` the arrays whose last dimension comes as two. `fill` names a value distribution and
    `layout` a memory layout per array. The arrays that `stacked` names lie behind one another in one buffer, where
    their kind has addresses (torch). With `repeat` the arguments' rows are repeated that often: each repetition's
    result must be that of the first, bit for bit.
    """

    name: str
    dims: Mapping[str, Any]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    host: Mapping[str, Any] = field(default_factory=dict)
    as_tensor: tuple[str, ...] = ()
    present: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    fill: Mapping[str, str] = field(default_factory=dict)
    layout: Mapping[str, str] = field(default_factory=dict)
    stacked: tuple[str, ...] = ()
    repeat: int = 1
