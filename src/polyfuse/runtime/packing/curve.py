"""`Curve`: predicted seconds over tokens, from a few measurements."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from polyfuse.spec import fail

Point = tuple[int, float]


def slope(left: Point, right: Point) -> float:
    """The slope of the line through two points; infinite if the line is upright."""
    return math.inf if left[0] == right[0] else (right[1] - left[1]) / (right[0] - left[0])


@dataclass(frozen=True)
class Curve:
    """Seconds over tokens: straight lines between `(tokens, seconds)` points, given in any order, kept sorted.

    Constant below the first point. Above the last it goes on with the last slope, or level if that falls; from a
    single point in proportion. Raises `SpecError` without points, for tokens below 1 or given twice, and for seconds
    that are negative or not finite.
    """

    points: Sequence[Point]
    _tokens: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        points = tuple(sorted((tokens, float(seconds)) for tokens, seconds in self.points))
        counts = tuple(tokens for tokens, _ in points)
        if not points:
            fail("Curve", "points", "at least one point", "none")
        if counts[0] < 1 or len(set(counts)) < len(counts):
            fail("Curve", "points", "different tokens >= 1", list(counts))
        for point in points:
            if not 0 <= point[1] < math.inf:
                fail("Curve", "points", "finite seconds >= 0", point)
        object.__setattr__(self, "points", points)
        object.__setattr__(self, "_tokens", counts)

    def __call__(self, tokens: int) -> float:
        """Seconds for `tokens` tokens."""
        right = bisect_left(self._tokens, tokens)
        first, last = self.points[0], self.points[-1]
        if right == 0:
            return first[1]
        if right < len(self.points):
            left = self.points[right - 1]
            return left[1] + slope(left, self.points[right]) * (tokens - left[0])
        rise = last[1] / last[0] if first is last else max(0.0, slope(self.points[-2], last))
        return last[1] + rise * (tokens - last[0])
