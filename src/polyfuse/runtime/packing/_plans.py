"""Plans while they are being made: `PartialPlan` for some of the items, and `BestPlan`, the best whole one so far."""

from typing import NamedTuple

from polyfuse.runtime.packing._menu import Budget
from polyfuse.runtime.packing._problem import Load, Problem

Groups = tuple[tuple[tuple[int, ...], Budget | None], ...]  # a plan: items and their budget; None is eager

_WORTHWHILE = 1e-3  # share of the best time that a branch of a heuristic search must be able to gain


class PartialPlan(NamedTuple):
    """A plan for some of the items: the replays and what they cost, the eager items, their tokens and their seconds."""

    replays: Groups
    spent: float
    eager: tuple[int, ...]
    eager_tokens: int
    eager_time: float

    def with_replay(self, items: tuple[int, ...], budget: Budget) -> "PartialPlan":
        """This plan with one more replay."""
        replays = (*self.replays, (items, budget))
        return PartialPlan(replays, self.spent + budget.cost, self.eager, self.eager_tokens, self.eager_time)

    def finished(self, items: tuple[int, ...], budget: Budget | None) -> Groups:
        """The whole plan, with all other items in one batch on `budget`; None joins them to the eager ones."""
        if budget is None:
            return (*self.replays, (self.eager + items, None))
        eager: Groups = ((self.eager, None),) if self.eager else ()
        return (*self.replays, (items, budget), *eager)


class BestPlan:
    """The best plan of a request so far: `groups`, which take `time` seconds."""

    def __init__(self, problem: Problem, groups: Groups, time: float) -> None:
        self._problem = problem
        self.groups, self.time = groups, time

    @property
    def goal(self) -> float:
        """What a branch must be able to get below to be worth following."""
        return self.time * (1 - _WORTHWHILE)

    def offer(self, groups: Groups, time: float) -> None:
        """Take a plan if it is better."""
        if time < self.time:
            self.groups, self.time = groups, time

    def offer_finished(self, plan: PartialPlan, rest: Load) -> None:
        """Take a partial plan if it is better with the rest in one batch, eager or on the cheapest budget for it."""
        time = plan.spent + self._problem.eager_time(plan.eager_tokens + rest.tokens)
        if time < self.time:
            self.groups, self.time = plan.finished(rest.items, None), time
        budget = self._problem.menu.cheapest(rest.tokens, len(rest.items), rest.frames)
        if budget is not None:
            time = plan.spent + plan.eager_time + budget.cost
            if time < self.time:
                self.groups, self.time = plan.finished(rest.items, budget), time
