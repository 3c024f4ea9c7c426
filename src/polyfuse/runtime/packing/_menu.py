"""The budgets that a plan can choose from, prepared for looking up."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from polyfuse.runtime.packing.curve import slope
from polyfuse.spec import fail


class Budget(NamedTuple):
    """A captured graph: how many tokens, items and frames it holds at most, and its predicted time in seconds."""

    tokens: int
    items: int
    frames: int
    cost: float

    def holds(self, tokens: int, items: int, frames: int) -> bool:
        """Whether so much is within all three limits."""
        return self.tokens >= tokens and self.items >= items and self.frames >= frames


class Line(NamedTuple):
    """A straight line below the costs of all budgets: each costs at least `base + per_token * tokens`; `base >= 0`."""

    base: float
    per_token: float


@dataclass(frozen=True, eq=False)
class Menu:
    """What depends on the budgets alone.

    `budgets` are in order of tokens, without those that a cheaper one can replace; `tokens` are theirs. `holding[i]`
    are the budgets of at least `tokens[i]` tokens, cheapest first. `lines` bound all costs from below.
    """

    budgets: tuple[Budget, ...]
    tokens: tuple[int, ...]
    holding: tuple[tuple[Budget, ...], ...]
    lines: tuple[Line, ...]

    def cheapest(self, tokens: int, items: int, frames: int) -> Budget | None:
        """The cheapest budget that holds so much, or None."""
        at = bisect_left(self.tokens, tokens)
        if at < len(self.tokens):
            for budget in self.holding[at]:
                if budget.items >= items and budget.frames >= frames:
                    return budget
        return None


@lru_cache(maxsize=64)
def make_menu(budgets: tuple[Budget, ...]) -> Menu:
    """Check the budgets and order them. Raises `SpecError` as `plan_packing` says."""
    for i, budget in enumerate(budgets):
        if min(budget.tokens, budget.items, budget.frames) < 1:
            fail("plan_packing", f"budgets[{i}]", "tokens, items and frames >= 1", tuple(budget))
        if not 0 <= budget.cost < math.inf:
            fail("plan_packing", f"budgets[{i}]", "a finite cost >= 0", tuple(budget))
    kept: list[Budget] = []  # cheapest first
    for budget in sorted(budgets, key=lambda b: (b.cost, -b.tokens, -b.items, -b.frames)):
        if not any(cheaper.holds(budget.tokens, budget.items, budget.frames) for cheaper in kept):
            kept.append(budget)
    ordered = tuple(sorted(kept))
    tokens = tuple(budget.tokens for budget in ordered)
    holding = tuple(tuple(budget for budget in kept if budget.tokens >= count) for count in tokens)
    return Menu(ordered, tokens, holding, _supporting_lines(ordered))


def _supporting_lines(budgets: Sequence[Budget]) -> tuple[Line, ...]:
    """The edges of the lower convex hull of cost over tokens, as far as they meet the axis above zero.

    The last line goes through the origin, at the least cost per token.
    """
    if not budgets:
        return ()
    hull: list[tuple[int, float]] = [(0, min(budget.cost for budget in budgets))]
    for budget in budgets:
        point = (budget.tokens, budget.cost)
        while len(hull) > 1 and slope(hull[-2], point) <= slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    lines = []
    for left, right in pairwise(hull):
        per_token = slope(left, right)
        base = left[1] - per_token * left[0]
        if base > 0:
            lines.append(Line(base, per_token))
    return (*lines, Line(0.0, min(budget.cost / budget.tokens for budget in budgets)))
