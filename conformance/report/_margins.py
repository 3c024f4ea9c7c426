"""How near the results came to their bounds, as small plots on a logarithmic axis."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyfuse.conformance.report._report import Report

LEAST, GREATEST = 1e-4, 10.0  # shares that the axis tells apart
LEFT, RIGHT = 12.0, 96.0  # where they lie, in percent of the width
EXACT = 4.0  # where results without any error lie, off the axis
BINS = 60


def place(share: float | None) -> float:
    """Where a share lies, in percent of the width. What is not finite lies at the right end."""
    if share == 0:
        return EXACT
    if share is None or not math.isfinite(share):
        return RIGHT
    position = math.log(share / LEAST) / math.log(GREATEST / LEAST)
    step = round(max(0.0, min(1.0, position)) * BINS) / BINS
    return round(LEFT + step * (RIGHT - LEFT), 2)


AXIS = [(EXACT, "exact"), *((place(share), label) for share, label in (
    (1e-4, "0.01%"), (1e-3, "0.1%"), (1e-2, "1%"), (1e-1, "10%"), (1.0, "bound"), (10.0, "10x"),
))]  # fmt: skip


@dataclass(frozen=True)
class Dot:
    """The results of like share: where, how many, and whether a case that failed is among them."""

    x: float
    count: int
    failed: bool

    @property
    def radius(self) -> float:
        """In pixels: the area grows with the number, up to a limit."""
        return round(min(8.0, 2.0 + math.sqrt(self.count) * 0.7), 1)


@dataclass(frozen=True)
class Worst:
    """The largest error of one result of an op, in which case and where in the array."""

    name: str
    share: float | None
    case: str
    at: tuple[int, ...]


@dataclass(frozen=True)
class Plot:
    """One op on one backend."""

    op: str
    backend: str
    dots: list[Dot]
    worst: list[Worst]

    @property
    def nearest(self) -> Worst:
        """The largest error of all results of the op."""
        return max(self.worst, key=lambda worst: _size(worst.share))


def plots(report: "Report") -> dict[str, list[Plot]]:
    """The plots of each op, one for each backend that has margins."""
    counts: dict[tuple[str, str], Counter[tuple[float, bool]]] = {}
    worst: dict[tuple[str, str], dict[str, Worst]] = {}
    for r in report.results:
        for name, margin in r.margins.items():
            share = margin["share"]
            counts.setdefault((r.op, r.backend), Counter())[place(share), r.status != "passed"] += 1
            known = worst.setdefault((r.op, r.backend), {})
            if name not in known or _size(share) > _size(known[name].share):
                known[name] = Worst(name, share, r.case, tuple(margin["at"] or ()))
    found: dict[str, list[Plot]] = {}
    for (op, backend), dots in counts.items():
        drawn = [Dot(x, count, failed) for (x, failed), count in sorted(dots.items())]
        found.setdefault(op, []).append(Plot(op, backend, drawn, list(worst[op, backend].values())))
    return found


def _size(share: float | None) -> float:
    return share if share is not None and math.isfinite(share) else math.inf
