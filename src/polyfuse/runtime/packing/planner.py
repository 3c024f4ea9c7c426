"""Which items share a graph replay, and which token budgets to capture: plans of the least predicted time.

An item is `(tokens, frames)`. Replaying a budget takes the same time whatever is inside, so a plan is a partition of
the items into batches, each on a budget that holds it, or eager. Times are in seconds. Standard library only.
"""

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from polyfuse.runtime.packing._menu import Budget, make_menu, slope
from polyfuse.runtime.packing._search import Search, greedy
from polyfuse.spec import fail

__all__ = ["Batch", "Budget", "Curve", "plan_packing", "predicted_time", "suggest_budgets"]

_FINEST_RATIO = 1.06  # of suggested budgets


class Batch(NamedTuple):
    """Items computed together, by ascending index, on `budget`; `None` is eager."""

    indices: tuple[int, ...]
    budget: Budget | None


@dataclass(frozen=True)
class Curve:
    """Seconds over tokens: straight lines between `(tokens, seconds)` points, given in any order, kept sorted.

    Constant below the first point. Above the last it goes on with the last slope, or level if that falls; from a
    single point in proportion. Raises `SpecError` without points, for tokens below 1 or given twice, and for seconds
    that are negative or not finite.
    """

    points: Sequence[tuple[int, float]]
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


def predicted_time(batches: Sequence[Batch], sizes: Sequence[tuple[int, int]], eager: Callable[[int], float]) -> float:
    """Seconds for `batches`: the cost of each budget, and `eager` of the total tokens of each eager batch."""
    return sum(
        eager(sum(sizes[i][0] for i in indices)) if budget is None else budget.cost for indices, budget in batches
    )


def plan_packing(
    sizes: Sequence[tuple[int, int]],
    budgets: Sequence[Budget],
    eager: Callable[[int], float],
    *,
    policy: str = "optimal",
) -> list[Batch]:
    """Partition a request's items, `sizes[i] = (tokens, frames)`, into replays and at most one eager batch.

    A batch on a budget keeps its three limits. The eager batch has none and takes `eager(its total tokens)` seconds:
    there is one, because two would take longer together than their union (eager time is subadditive in practice).
    `eager` must not fall as tokens grow. It may be infinite, for never; if an item then fits no budget, no plan is
    finite and all items are eager.

    `policy`:
      - `"optimal"`: the least predicted time. Exact for up to 8 items; for more, the best that a search of bounded
        effort finds, never slower than `"greedy"`.
      - `"greedy"`: a batch is filled with items by ascending tokens up to the limits of the largest budget, and takes
        the smallest budget that holds it; items that the largest budget cannot hold are eager.

    Returns the batches by first index, the same ones for the same arguments. Raises `SpecError` for no items, tokens
    or frames below 1, a budget with a limit below 1 or a cost that is negative or not finite, an unknown policy.
    """
    if policy not in ("optimal", "greedy"):
        fail("plan_packing", "policy", "optimal or greedy", repr(policy))
    if not sizes:
        fail("plan_packing", "sizes", "at least one item", "none")
    for i, size in enumerate(sizes):
        if size[0] < 1 or size[1] < 1:
            fail("plan_packing", f"sizes[{i}]", "tokens and frames >= 1", tuple(size))
    menu = make_menu(tuple(budgets))
    groups = greedy(sizes, budgets) if policy == "greedy" else Search(sizes, menu, eager).run()
    return sorted(Batch(tuple(sorted(items)), budget) for items, budget in groups)


def _replay_cost(tokens: int) -> float:
    return 0.8e-3 + 15.7e-6 * tokens


def suggest_budgets(
    requests: Sequence[int] | None = None,
    *,
    smallest: int = 64,
    largest: int,
    max_graphs: int = 40,
    cost: Callable[[int], float] = _replay_cost,
    multiple_of: int = 1,
) -> tuple[int, ...]:
    """At most `max_graphs` token budgets, ascending, multiples of `multiple_of` between `smallest` and `largest`.

    With `requests`, a sample of total tokens per request: the budgets that minimise the sum of `cost(budget)`, each
    request on the smallest budget that holds it. The last one holds the largest request; requests that no budget up
    to `largest` can hold are left out. `cost` is the predicted seconds of a replay, by default proportional to the
    tokens plus a constant (which changes nothing here).
    Without `requests`, a geometric ladder up to `largest`, as fine as `max_graphs` allows but no finer than 1.06.

    Raises `SpecError` for a number below 1, no multiple of `multiple_of` between `smallest` and `largest`, requests
    below 1 or none that a budget can hold, and a cost that is negative or not finite.
    """
    for name, value in (("smallest", smallest), ("max_graphs", max_graphs), ("multiple_of", multiple_of)):
        if value < 1:
            fail("suggest_budgets", name, "a number >= 1", value)
    low, high = _round_up(smallest, multiple_of), largest // multiple_of * multiple_of
    if high < low:
        fail("suggest_budgets", "largest", f"a multiple of multiple_of={multiple_of} from {low} on", largest)
    if requests is None:
        steps = min(max_graphs - 1, int(math.log(high / low) / math.log(_FINEST_RATIO) + 1e-9))
        rungs = [low * (high / low) ** (step / steps) for step in range(steps)] if steps else []
        return tuple(sorted({*(_round_up(math.ceil(rung - 1e-6), multiple_of) for rung in rungs), high}))
    if min(requests, default=1) < 1:
        fail("suggest_budgets", "requests", "total tokens >= 1", min(requests))
    counts = Counter(max(low, _round_up(tokens, multiple_of)) for tokens in requests if tokens <= high)
    if not counts:
        fail("suggest_budgets", "requests", f"at least one request of at most {high} tokens", f"{len(requests)} others")
    budgets = sorted(counts)
    costs = [cost(tokens) for tokens in budgets]
    for tokens, seconds in zip(budgets, costs, strict=True):
        if not 0 <= seconds < math.inf:
            fail("suggest_budgets", "cost", "finite seconds >= 0", f"{seconds} for {tokens} tokens")
    return tuple(budgets[i] for i in _choose(costs, [counts[tokens] for tokens in budgets], max_graphs))


def _round_up(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple


def _choose(costs: Sequence[float], counts: Sequence[int], most: int) -> list[int]:
    """At most `most` ascending indices, the last included, of the least sum over j of counts[j] * costs[next chosen].

    With i and j chosen one after the other, j pays `costs[j] * (total[j] - total[i])`: for each j the lowest of the
    lines `least[i] - total[i] * x` at `x = costs[j]`, found on their lower envelope.
    """
    total = [0, *accumulate(counts)]
    size = len(costs)
    least = [0.0] + [math.inf] * size  # least[j]: of the first j, with j - 1 chosen
    origins: list[list[int]] = []
    ends: list[float] = []
    for _ in range(min(most, size)):
        envelope: list[int] = []
        starts: list[float] = []  # from which x on each line of the envelope is the lowest
        update, origin = [math.inf], [0]
        for j, x in enumerate(costs):
            if least[j] < math.inf:
                start = -math.inf
                while envelope:
                    start = (least[j] - least[envelope[-1]]) / (total[j] - total[envelope[-1]])
                    if start > starts[-1]:
                        break
                    envelope.pop()
                    starts.pop()
                envelope.append(j)
                starts.append(start if len(envelope) > 1 else -math.inf)
            i = envelope[bisect_right(starts, x) - 1] if envelope else j
            update.append(least[i] + x * (total[j + 1] - total[i]))
            origin.append(i)
        least = update
        origins.append(origin)
        ends.append(least[size])
    chosen = []
    j = size
    for origin in reversed(origins[: ends.index(min(ends)) + 1]):
        chosen.append(j - 1)
        j = origin[j]
    return chosen[::-1]
