"""The plan of the least predicted time for one request: the steps that the package's docstring lists."""

from collections.abc import Callable, Sequence

from polyfuse.runtime.packing._bound import LowerBound
from polyfuse.runtime.packing._exact import offer_best_partition
from polyfuse.runtime.packing._greedy import greedy_groups
from polyfuse.runtime.packing._menu import Budget, Menu
from polyfuse.runtime.packing._plans import BestPlan, Groups, PartialPlan
from polyfuse.runtime.packing._problem import Problem
from polyfuse.runtime.packing._tree import TreeSearch

_EXACT_ITEMS = 8  # up to so many, all partitions are compared


def least_time_groups(sizes: Sequence[tuple[int, int]], menu: Menu, eager: Callable[[int], float]) -> Groups:
    """The best plan found for a request's items, as items and their budget."""
    items = tuple(sorted(range(len(sizes)), key=lambda i: -sizes[i][0]))
    fitting: list[int] = []
    too_large: list[int] = []
    for i in items:
        tokens, frames = sizes[i]
        if menu.cheapest(tokens, 1, frames) is None:
            too_large.append(i)
        else:
            fitting.append(i)
    if not fitting:
        return ((items, None),)
    problem = Problem(sizes, menu, eager)
    best = BestPlan(problem, ((items, None),), problem.eager_time(sum(problem.tokens)))
    eager_tokens = sum([problem.tokens[i] for i in too_large])
    start = PartialPlan((), 0.0, tuple(too_large), eager_tokens, problem.eager_time(eager_tokens))
    rest = problem.load(tuple(fitting))
    best.offer_finished(start, rest)
    if len(fitting) == 1:
        return best.groups
    bound = LowerBound(problem, rest)
    if len(fitting) <= _EXACT_ITEMS:
        if not bound.excludes_better(start, rest, best.time):
            offer_best_partition(problem, best, start, rest.items)
    elif not bound.excludes_better(start, rest, best.goal):
        TreeSearch(problem, bound, best).run(start, rest.items)
        _offer_greedy(problem, best)
    return best.groups


def _offer_greedy(problem: Problem, best: BestPlan) -> None:
    """Offer the greedy batches, each on its cheapest budget."""
    groups: list[tuple[tuple[int, ...], Budget | None]] = []
    time = 0.0
    for items, budget in greedy_groups(problem.sizes, problem.menu.budgets):
        load = problem.load(items)
        if budget is not None:
            budget = problem.menu.cheapest(load.tokens, len(items), load.frames)
        groups.append((items, budget))
        time += problem.eager_time(load.tokens) if budget is None else budget.cost
    best.offer(tuple(groups), time)
