"""What the values of a graph can mean before they are quantised: labels of tensors, activations and normalised rows.

Nodes with equal labels have equal values, bit for bit, in row-major order of their elements.
"""

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import torch
from torch.fx import Node


@dataclass(frozen=True)
class Near:
    """What a value almost is, and why it is not; `scaled` if it left the way behind amax, and not the way to y."""

    reason: str
    scaled: bool


@dataclass(frozen=True)
class Source:
    """A tensor of which no more is known than its node."""

    node: Node
    near: Near | None = None


@dataclass(frozen=True)
class Halves:
    """The two halves of x [..., 2*D] along its last dimension, as a tuple of tensors."""

    x: Node


class Part(Enum):
    """Which half of x [..., 2*D] a value is; the number is its index among the two."""

    GATE = 0
    UP = 1


@dataclass(frozen=True)
class Half:
    """Half of the columns of x: the first or the last D of them, or if `interleaved` every second one."""

    x: Node
    part: Part
    interleaved: bool = False


@dataclass(frozen=True)
class Clamped:
    """A tensor clamped to [low, high]; None is no bound."""

    of: "Source | Half"
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Shifted:
    """A tensor plus a number, rounded to the dtype `rounded`."""

    of: "Unrounded"
    offset: float
    rounded: torch.dtype


@dataclass(frozen=True)
class Scaled:
    """A tensor times a number, rounded to the dtype `rounded`."""

    of: "Unrounded"
    factor: float
    rounded: torch.dtype


@dataclass(frozen=True)
class Sigmoid:
    """sigmoid(of), rounded to the dtype `rounded`."""

    of: "Operand"
    rounded: torch.dtype


@dataclass(frozen=True)
class Silu:
    """gate * sigmoid(alpha * gate), then at most `high`, rounded to the dtype `rounded`.

    `steps` has the dtypes that alpha * gate, if there is an alpha, and its sigmoid were rounded to; torch's own silu
    has no such steps.
    """

    gate: "Operand"
    rounded: torch.dtype
    alpha: float | None = None
    steps: tuple[torch.dtype, ...] = ()
    high: float | None = None
    inexact: str = ""


@dataclass(frozen=True)
class Product:
    """silu * up, rounded to the dtype `rounded`."""

    silu: Silu
    up: "Operand"
    rounded: torch.dtype


@dataclass(frozen=True)
class Weighted:
    """A product times the weight of its row, rounded to the dtype `rounded`."""

    product: Product
    weight: "Operand"
    rounded: torch.dtype


class Moment(Enum):
    """What `Statistic` has computed from the rows of a tensor."""

    SQUARES = "h * h"
    MEAN = "the mean of h * h over the last dimension"
    WITH_EPS = "that mean plus eps"
    ROOT = "sqrt of that"
    INVERSE = "1 / sqrt of that"


@dataclass(frozen=True)
class Statistic:
    """A float32 value on the way from h to its normalisation; `rows` is the node over whose last dimension it goes."""

    moment: Moment
    of: "Operand"
    rows: Node
    eps: float = 0.0


@dataclass(frozen=True)
class Normalised:
    """h / sqrt(mean(h * h) + eps), rounded to the dtype `rounded`; the mean is over the last dimension of `rows`."""

    of: "Operand"
    rows: Node
    eps: float
    rounded: torch.dtype


@dataclass(frozen=True)
class Normed:
    """Normalised rows times a weight for each column, rounded to the dtype `rounded`."""

    normalised: Normalised
    weight: "Operand"
    rounded: torch.dtype


@dataclass(frozen=True)
class Magnitude:
    """The absolute values of a tensor."""

    y: "Value"


Unrounded: TypeAlias = Source | Half | Clamped
Operand: TypeAlias = Unrounded | Shifted | Scaled  # what can be gate, up, h or weights
Rounded: TypeAlias = Shifted | Scaled | Sigmoid | Silu | Product | Weighted | Normalised | Normed
Value: TypeAlias = Unrounded | Magnitude | Statistic | Rounded  # what can be y


def near_of(value: Value) -> Near | None:
    """What a tensor almost is, also after steps that many functions take."""
    match value:
        case Source():
            return value.near
        case Clamped() | Shifted() | Scaled() | Sigmoid() | Normalised():
            return near_of(value.of)
    return None
