"""What the values of a graph can mean to the fusion of the quantising ops.

Nodes with equal labels have equal values, bit for bit, in row-major order of their elements: a view has the label of
what it views. `inexact` says why a value may differ in its last bits from what the op computes in its place.
"""

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import torch
from torch.fx import Node

from polyfuse.runtime.fusion._values import Halves, Value


@dataclass(frozen=True)
class Const:
    """A tensor filled with one float32 number."""

    value: float


@dataclass(frozen=True)
class Scale:
    """The largest |y| of each group, then divided by `divisor`, at most `high`, at least `low`, a power of two.

    None is a step that was not taken. With `reciprocal` it is no division, but a multiplication by the float32 nearest
    to 1 / divisor. `at` is a node that has y as rows [..., D] of whole groups.
    """

    y: Value
    at: Node
    group_size: int
    divisor: float | None = None
    reciprocal: bool = False
    high: float | None = None
    low: float | None = None
    power_of_two: bool = False
    inexact: str = ""


class Stage(Enum):
    """What `Step` has computed from a scale."""

    WITH_INDEX = "the tuple (scale, index) that a maximum gives"
    IS_INFINITE = "scale == inf"
    RECIPROCAL = "1 / scale"
    BITS = "the scale's bits as int32"
    CARRIED_BITS = "those bits + 0x7FFFFF, which carries into the exponent unless the mantissa is zero"
    RAISED_BITS = "the carried bits without their mantissa"
    RAISED = "the raised bits as float32: the scale rounded up to a power of two, but for NaN"
    EXPONENTS = "the bits >> 23, as int32"
    LOG2 = "log2(scale)"
    CEIL_LOG2 = "ceil(log2(scale))"


@dataclass(frozen=True)
class Step:
    """A value on the way from a scale to another scale or to its packed form."""

    stage: Stage
    scale: Scale


@dataclass(frozen=True)
class Capped:
    """min(scale, high), which also bounds an infinite scale."""

    scale: Scale
    high: float


@dataclass(frozen=True)
class ExponentBytes:
    """The exponents of a scale, one uint8 for each group; `padded` with zeros to whole int32 words."""

    scale: Scale
    padded: bool = False


@dataclass(frozen=True)
class Packed:
    """The exponent bytes of a scale, four per int32."""

    scale: Scale


@dataclass(frozen=True)
class Moved:
    """A scale, as it is or packed, with its dimensions in another order; `padded` with rows at the end."""

    label: Scale | Packed
    order: tuple[int, ...]
    padded: bool = False

    @property
    def scale(self) -> Scale:
        """The scale itself."""
        return self.label.scale if isinstance(self.label, Packed) else self.label


@dataclass(frozen=True)
class Ratio:
    """y / scale, then clamped to [low, high], rounded to integers, its NaN replaced by 0; each only if it says so."""

    scale: Scale
    low: float | None = None
    high: float | None = None
    rounded: bool = False
    nan_is_zero: bool = False
    inexact: str = ""


@dataclass(frozen=True)
class IsNaN:
    """Where a value is NaN."""

    label: Scale | Ratio


@dataclass(frozen=True)
class Quantised:
    """q: a ratio converted to a quantised dtype."""

    ratio: Ratio
    dtype: torch.dtype


Label: TypeAlias = (
    Const | Halves | Value | Scale | Step | Capped | ExponentBytes | Packed | Moved | Ratio | IsNaN | Quantised
)


def scale_of(label: Label | None) -> Scale | None:
    """The scale that a value is, or was made from; None for what comes before any scale."""
    match label:
        case Scale():
            return label
        case Step() | Capped() | ExponentBytes() | Packed() | Moved() | Ratio():
            return label.scale
        case IsNaN():
            return scale_of(label.label)
        case Quantised():
            return label.ratio.scale
    return None
