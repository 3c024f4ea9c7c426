"""`plan_packing`: which items of a request share a graph replay, so that the predicted time is least."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from polyfuse.runtime.packing._greedy import greedy_groups
from polyfuse.runtime.packing._menu import Budget, make_menu
from polyfuse.runtime.packing._search import least_time_groups
from polyfuse.runtime.packing.curve import Curve
from polyfuse.runtime.packing.suggest import suggest_budgets
from polyfuse.spec import fail

__all__ = ["Batch", "Budget", "Curve", "plan_packing", "predicted_time", "suggest_budgets"]


class Batch(NamedTuple):
    """Items computed together, by ascending index, on `budget`; `None` is eager."""

    indices: tuple[int, ...]
    budget: Budget | None


def predicted_time(batches: Sequence[Batch], sizes: Sequence[tuple[int, int]], eager: Callable[[int], float]) -> float:
    """Seconds for `batches`: the cost of each budget, and `eager` of the total tokens of each eager batch."""
    seconds = 0.0
    for indices, budget in batches:
        seconds += eager(sum(sizes[i][0] for i in indices)) if budget is None else budget.cost
    return seconds


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
    groups = greedy_groups(sizes, budgets) if policy == "greedy" else least_time_groups(sizes, menu, eager)
    return sorted(Batch(tuple(sorted(items)), budget) for items, budget in groups)
