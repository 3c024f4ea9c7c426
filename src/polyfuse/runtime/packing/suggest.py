"""`suggest_budgets`: which token budgets to capture, from a sample of requests or without one."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate

from polyfuse.spec import fail

_FINEST_RATIO = 1.06  # of neighbouring budgets, where no requests are given


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
        return _ladder(low, high, max_graphs, multiple_of)
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
    return tuple(budgets[i] for i in _best_choice(costs, [counts[tokens] for tokens in budgets], max_graphs))


def _round_up(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple


def _ladder(low: int, high: int, max_graphs: int, multiple_of: int) -> tuple[int, ...]:
    """Budgets from `low` to `high` whose neighbours all have about the same ratio."""
    finest = int(math.log(high / low) / math.log(_FINEST_RATIO) + 1e-9)
    steps = min(max_graphs - 1, finest)
    budgets = {high}
    for step in range(steps):
        rung = low * (high / low) ** (step / steps)
        budgets.add(_round_up(math.ceil(rung - 1e-6), multiple_of))
    return tuple(sorted(budgets))


class _LowerEnvelope:
    """Straight lines, each steeper downwards than the one before, and which of them is the lowest at some x."""

    def __init__(self) -> None:
        self._lines: list[tuple[int, float, int]] = []  # (name, value at 0, fall), those that are lowest somewhere
        self._starts: list[float] = []  # from which x on each of these is the lowest

    def add(self, name: int, at_zero: float, fall: int) -> None:
        """Add the line `at_zero - fall * x`; `fall` is larger than that of every line before."""
        start = -math.inf
        while self._lines:
            _, other_at_zero, other_fall = self._lines[-1]
            start = (at_zero - other_at_zero) / (fall - other_fall)
            if start > self._starts[-1]:
                break
            self._lines.pop()
            self._starts.pop()
        self._starts.append(start if self._lines else -math.inf)
        self._lines.append((name, at_zero, fall))

    def lowest(self, x: float) -> int | None:
        """The name of the line that is the lowest at x; None without lines."""
        if not self._lines:
            return None
        return self._lines[bisect_right(self._starts, x) - 1][0]


def _best_choice(costs: Sequence[float], counts: Sequence[int], most: int) -> list[int]:
    """At most `most` of the indices, ascending and with the last one, that serve all at the least cost.

    Index j is served by the next chosen one, at its cost; the sum of `counts[j] * costs[next chosen]` is the least.

    Dynamic programming over how many are chosen: `least[end]` is the least cost of the first `end` indices, the last
    of them chosen. If j is chosen next after `start - 1`, it serves those from `start` to j, and the cost becomes
    `least[start] + costs[j] * (total[j + 1] - total[start])`. Over all starts that is the lowest of the lines
    `least[start] - total[start] * x` at `x = costs[j]`.
    """
    total = [0, *accumulate(counts)]
    size = len(costs)
    least = [0.0] + [math.inf] * size
    starts_by_round: list[list[int]] = []
    cost_by_round: list[float] = []
    for _ in range(min(most, size)):
        envelope = _LowerEnvelope()
        next_least, starts = [math.inf], [0]
        for j, cost in enumerate(costs):
            if least[j] < math.inf:
                envelope.add(j, least[j], total[j])
            lowest = envelope.lowest(cost)
            start = j if lowest is None else lowest
            next_least.append(least[start] + cost * (total[j + 1] - total[start]))
            starts.append(start)
        least = next_least
        starts_by_round.append(starts)
        cost_by_round.append(least[size])
    rounds = cost_by_round.index(min(cost_by_round)) + 1
    chosen = []
    end = size
    for starts in reversed(starts_by_round[:rounds]):
        chosen.append(end - 1)
        end = starts[end]
    return chosen[::-1]
