"""The budgets that a plan can choose from, prepared for looking up. Standard library only."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from polyfuse.spec import fail


class Budget(NamedTuple):
    """A captured graph: how many tokens, items and frames it holds at most, and its predicted time in seconds."""

    tokens: int
    items: int
    frames: int
    cost: float


class Menu(NamedTuple):
    """What depends on the budgets alone."""

    budgets: tuple[Budget, ...]  # by tokens, without those that a cheaper one replaces
    tokens: tuple[int, ...]
    holding: tuple[tuple[Budget, ...], ...]  # holding[i]: those of at least tokens[i] tokens, cheapest first
    lines: tuple[tuple[float, float], ...]  # (a, b), a >= 0: every budget costs at least a + b * tokens

    def cheapest(self, tokens: int, items: int, frames: int) -> Budget | None:
        """The cheapest budget that holds so much."""
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
        if min(budget[:3]) < 1:
            fail("plan_packing", f"budgets[{i}]", "tokens, items and frames >= 1", tuple(budget))
        if not 0 <= budget.cost < math.inf:
            fail("plan_packing", f"budgets[{i}]", "a finite cost >= 0", tuple(budget))
    kept: list[Budget] = []
    for budget in sorted(budgets, key=lambda b: (b.cost, -b.tokens, -b.items, -b.frames)):
        if not any(k.tokens >= budget.tokens and k.items >= budget.items and k.frames >= budget.frames for k in kept):
            kept.append(budget)
    ordered = tuple(sorted(kept))
    holding = tuple(tuple(b for b in kept if b.tokens >= budget.tokens) for budget in ordered)
    return Menu(ordered, tuple(b.tokens for b in ordered), holding, _supporting_lines(ordered))


def _supporting_lines(budgets: Sequence[Budget]) -> tuple[tuple[float, float], ...]:
    """The edges of the lower convex hull of cost over tokens, as far as they meet the axis above zero."""
    if not budgets:
        return ()
    hull: list[tuple[int, float]] = [(0, min(b.cost for b in budgets))]
    for point in ((b.tokens, b.cost) for b in budgets):
        while len(hull) > 1 and slope(hull[-2], point) <= slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    edges = [(p[1] - slope(p, q) * p[0], slope(p, q)) for p, q in pairwise(hull)]
    return (*(edge for edge in edges if edge[0] > 0), (0.0, min(b.cost / b.tokens for b in budgets)))


def slope(p: tuple[int, float], q: tuple[int, float]) -> float:
    """Of the line through two points; infinite if it is upright."""
    return math.inf if p[0] == q[0] else (q[1] - p[1]) / (q[0] - p[0])
