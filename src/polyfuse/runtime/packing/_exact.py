"""The best of all partitions of a few items, by dynamic programming over their subsets."""

import math

from polyfuse.runtime.packing._menu import Budget
from polyfuse.runtime.packing._plans import BestPlan, Groups, PartialPlan
from polyfuse.runtime.packing._problem import Problem


class Partitions:
    """For every subset of some items, the cheapest partition into replays. A subset is a bit mask of the items.

    `least[subset]` is its cost, `tokens[subset]` are its tokens. It is found in O(3^items): the batch with the
    subset's first item is each of the smaller subsets that have it, and what is left is partitioned already.
    """

    def __init__(self, problem: Problem, items: tuple[int, ...]) -> None:
        self._items = items
        self.all = (1 << len(items)) - 1
        size = self.all + 1
        self.tokens, self.least = [0] * size, [0.0] * size
        self._budget: list[Budget | None] = [None] * size  # for the subset as one batch
        self._first_batch = [0] * size
        frames = [0] * size
        alone = [math.inf] * size  # the cost of the subset as one batch
        tokens, least = self.tokens, self.least
        for subset in range(1, size):
            others = subset & (subset - 1)
            first = items[(subset ^ others).bit_length() - 1]
            tokens[subset] = tokens[others] + problem.tokens[first]
            frames[subset] = frames[others] + problem.frames[first]
            budget = problem.menu.cheapest(tokens[subset], subset.bit_count(), frames[subset])
            if budget is not None:
                self._budget[subset] = budget
                alone[subset] = budget.cost
            best, first_batch = alone[subset], subset
            left = others
            while left:  # goes through all subsets of the others
                cost = least[left] + alone[subset ^ left]
                if cost < best:
                    best, first_batch = cost, subset ^ left
                left = (left - 1) & others
            least[subset], self._first_batch[subset] = best, first_batch

    def members(self, subset: int) -> tuple[int, ...]:
        """The items of a subset."""
        return tuple([item for position, item in enumerate(self._items) if subset >> position & 1])

    def groups(self, subset: int) -> Groups:
        """The batches of a subset's cheapest partition."""
        groups = []
        while subset:
            batch = self._first_batch[subset]
            groups.append((self.members(batch), self._budget[batch]))
            subset ^= batch
        return tuple(groups)


def offer_best_partition(problem: Problem, best: BestPlan, start: PartialPlan, items: tuple[int, ...]) -> None:
    """Offer the best of all partitions of `items`, with each subset of them eager beside the eager ones of `start`."""
    partitions = Partitions(problem, items)
    best_time, best_eager = best.time, None
    for eager in range(partitions.all + 1):
        replays_cost = partitions.least[partitions.all ^ eager]
        if replays_cost < best_time:
            time = replays_cost + problem.eager_time(start.eager_tokens + partitions.tokens[eager])
            if time < best_time:
                best_time, best_eager = time, eager
    if best_eager is None:
        return
    groups = partitions.groups(partitions.all ^ best_eager)
    away = start.eager + partitions.members(best_eager)
    best.offer((*groups, (away, None)) if away else groups, best_time)
