"""What the values of a graph can mean to the fusion of `silu_mul_block_quant`.

Nodes with equal labels have equal values, bit for bit, in row-major order of their elements: a view has the label of
what it views. `inexact` says why a value may differ in its last bits from what the op computes in its place.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.fx import Node


@dataclass(frozen=True)
class Const:
    """A tensor filled with one float32 number."""

    value: float


@dataclass(frozen=True)
class Halves:
    """The two halves of x [..., 2*D] along its last dimension, as a tuple of tensors."""

    x: Node


@dataclass(frozen=True)
class Half:
    """gate (part 0) or up (part 1) of x, clamped to [low, high]."""

    x: Node
    part: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Silu:
    """silu(gate). `computed` is the dtype of silu's argument, `rounded` the dtype that its value was rounded to."""

    gate: Half
    computed: torch.dtype
    rounded: torch.dtype
    inexact: str = ""


@dataclass(frozen=True)
class Product:
    """y = silu(gate) * up, rounded to a dtype."""

    silu: Silu
    rounded: torch.dtype

    @property
    def x(self) -> Node:
        return self.silu.gate.x


@dataclass(frozen=True)
class Magnitude:
    """|y|."""

    y: Product


@dataclass(frozen=True)
class Scale:
    """The largest |y| of each group, then divided by `divisor`, at most `high`, at least `low`, a power of two.

    `reciprocal`: multiplied by the float32 nearest to 1 / divisor instead.
    """

    y: Product
    group_size: int
    divisor: float | None = None
    reciprocal: bool = False
    high: float | None = None
    low: float | None = None
    power_of_two: bool = False
    inexact: str = ""


@dataclass(frozen=True)
class Step:
    """A value on the way from a scale to another or to its packed form; `kind` names it, `number` is its argument.

    indexed: (scale, index) of a maximum    capped: min(scale, number)    infinite: scale == inf
    bits: as int32    carried: bits + 0x7FFFFF    raised_bits: carried, without mantissa    raised: that as float32
    shifted: bits >> 23    exponents: that as bytes (number 1: padded to whole words)
    log2    ceil_log2    reciprocal: 1 / scale
    """

    kind: str
    scale: Scale
    number: float = 0.0


@dataclass(frozen=True)
class Packed:
    """The exponent bytes of a scale, four per int32."""

    scale: Scale


@dataclass(frozen=True)
class Moved:
    """A scale with its dimensions in another order; `padded`: with rows added at the end."""

    label: Scale | Packed
    order: tuple[int, ...]
    padded: bool = False


@dataclass(frozen=True)
class Ratio:
    """y / scale, then clamped to [low, high], rounded to integers, NaN replaced by 0."""

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
    Const | Halves | Half | Silu | Product | Magnitude | Scale | Step | Packed | Moved | Ratio | IsNaN | Quantised
)


def scale_of(label: Label | None) -> Scale | None:
    """The scale that a value is, or was made from; None for what comes before any scale."""
    match label:
        case Scale():
            return label
        case Step() | Packed() | Ratio():
            return label.scale
        case Moved() | IsNaN():
            return scale_of(label.label)
        case Quantised():
            return label.ratio.scale
    return None
