"""`Node`: a partial plan in the search tree, and the `Move`s that serve the largest item that it leaves."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from polyfuse.runtime.packing._bound import LowerBound
from polyfuse.runtime.packing._menu import Budget
from polyfuse.runtime.packing._plans import PartialPlan
from polyfuse.runtime.packing._problem import Choice, Load, Problem
from polyfuse.runtime.packing._subset_sums import Subsets

_FAR_BUDGETS = 4  # looked at where the end is far
_MANY_OTHERS = 32  # where the end is far, of more than these every second is enough
_FILLINGS = 1000  # looked at by one node, over all budgets, times the items
_MOST_FILLINGS = 5  # and for one budget


class Move(NamedTuple):
    """A way to serve the largest item left: eager, or in a replay with others that have given sums.

    The whole plan then takes at least `bound` seconds if the others need more than one batch, and about `last_but_one`
    if they need one. `choice` is the replay's budget, None for eager; `sums` are the others' grains and units in it.
    """

    time_per_token: float
    bound: float
    last_but_one: float
    choice: Choice | None
    sums: tuple[int, int]


def time_per_token(choice: Choice) -> float:
    """Seconds of a full replay by its tokens."""
    return choice.budget.cost / choice.budget.tokens


class Node:
    """A partial plan, the items that it leaves, and in `moves` what may lead from it to a plan faster than `goal`.

    `far` says that many replays are left. Then a node looks at few budgets, and at one filling of each.
    """

    def __init__(
        self, problem: Problem, bound: LowerBound, plan: PartialPlan, rest: Load, goal: float, far: bool
    ) -> None:
        self._problem, self._bound = problem, bound
        self._plan, self._rest = plan, rest
        self._goal, self._far = goal, far
        first = rest.items[0]
        self._first_tokens, self._first_units = problem.tokens[first], problem.units[first]
        self._other_tokens, self._other_units = rest.tokens - self._first_tokens, rest.units - self._first_units
        self._eager_time_with_first = problem.eager_time(plan.eager_tokens + self._first_tokens)
        choices = self._choices_for_first()
        room, units, counts_units = self._limits_of_others(choices)
        others = rest.items[1:]
        if far and len(others) > _MANY_OTHERS:  # half of them fill one of many replays well enough
            others = others[::2]
        self._subsets = Subsets(problem.tokens, problem.units, others, room, units if counts_units else None)
        most_grains, _ = self._subsets.largest(room, units)
        fullest = most_grains * self._subsets.grain
        if far:
            choices = self._few_choices(choices, self._first_tokens + fullest)
        self.moves: list[Move] = [self._eager_move()]
        self._add_replays(choices, fullest)
        self.effort = 40 + 3 * len(self.moves) + (4 if self._subsets.counts_units else 2) * len(rest.items)

    def follow(self, move: Move) -> tuple[PartialPlan, tuple[int, ...]]:
        """The plan with one more batch, and the items that are left."""
        items = self._rest.items
        if move.choice is None:
            return self._with_first_eager(), items[1:]
        batch = self._batch(move.choice, move.sums)
        inside = set(batch)
        return self._plan.with_replay(batch, move.choice.budget), tuple([i for i in items if i not in inside])

    def _choices_for_first(self) -> Sequence[Choice]:
        """The budgets that hold the largest item, in order of tokens."""
        problem = self._problem
        choices = problem.limits.choices[bisect_left(problem.menu.tokens, self._first_tokens) :]
        if problem.may_exclude_one:
            units, frames = self._first_units, problem.frames[self._rest.items[0]]
            return [choice for choice in choices if choice.units >= units and choice.budget.frames >= frames]
        return choices

    def _limits_of_others(self, choices: Sequence[Choice]) -> tuple[int, int, bool]:
        """The most tokens and units that can join the largest item, and whether the limit of units can bind at all."""
        problem, rest = self._problem, self._rest
        largest = choices[-1].budget.tokens
        room = min(largest, rest.tokens) - self._first_tokens
        units = min(problem.limits.most_units, rest.units) - self._first_units
        counts_units = problem.limits.least_units < rest.units
        if counts_units and not problem.counts_frames:
            smallest = list(accumulate([problem.tokens[i] for i in reversed(rest.items)]))
            counts_units = any(c.units < rest.units and smallest[c.units] <= c.budget.tokens for c in choices)
            units = min(units, bisect_right(smallest, largest))
            room = min(room, sum([problem.tokens[i] for i in rest.items[1 : units + 1]]))
        return room, units, counts_units

    def _few_choices(self, choices: Sequence[Choice], fullest: int) -> list[Choice]:
        """The cheapest budget that holds the fullest batch, and of the smaller ones the cheapest by token."""
        end = bisect_left(choices, fullest, key=lambda choice: choice.budget.tokens)
        smaller = sorted(choices[:end], key=time_per_token)[: _FAR_BUDGETS - 1]
        return [*smaller, min(choices[end:], key=lambda choice: choice.budget.cost)]

    def _eager_move(self) -> Move:
        bound, plan = self._bound, self._plan
        replays = bound.replays(self._other_tokens, self._other_units, 1)
        least = plan.spent + self._eager_time_with_first + replays * bound.base + self._other_tokens * bound.per_token
        rate = (self._eager_time_with_first - plan.eager_time) / self._first_tokens
        return Move(rate, least, math.inf, None, (0, 0))

    def _with_first_eager(self) -> PartialPlan:
        plan = self._plan
        eager, tokens = (*plan.eager, self._rest.items[0]), plan.eager_tokens + self._first_tokens
        return PartialPlan(plan.replays, plan.spent, eager, tokens, self._eager_time_with_first)

    def _add_replays(self, choices: Sequence[Choice], fullest: int) -> None:
        """Add a move for each budget and each of its fullest fillings, but for those that a cheaper budget holds.

        A budget's fillings end where even a bound on what is left is not below the goal.
        """
        problem, plan, rest, subsets = self._problem, self._plan, self._rest, self._subsets
        replays, other_tokens = self._bound.replays, self._other_tokens
        base, per_token, eager = self._bound.base, self._bound.per_token, plan.eager_time
        goal, far, first_tokens, first_units = self._goal, self._far, self._first_tokens, self._first_units
        others_eager = problem.eager_time(plan.eager_tokens + max(1, other_tokens - fullest))
        fillings = 1 if far else max(1, min(_MOST_FILLINGS, _FILLINGS // (len(choices) * len(rest.items))))
        found: dict[tuple[int, int], Budget] = {}
        for choice in choices:
            budget = choice.budget
            if budget.tokens >= rest.tokens and budget.holds(rest.tokens, len(rest.items), rest.frames):
                continue  # all the rest on it is tried elsewhere
            spent = plan.spent + budget.cost
            room, units = budget.tokens - first_tokens, choice.units - first_units
            for _ in range(fillings):
                sums = subsets.largest(room, units)
                other = found.setdefault(sums, budget)
                if other.cost < budget.cost and other.items >= budget.items and other.frames >= budget.frames:
                    break
                grains, filled_units = sums
                filled = grains * subsets.grain
                left = max(1, other_tokens - filled)
                if spent + min(eager + base + per_token * left, others_eager) >= goal:
                    break
                units_left = max(1, self._other_units - filled_units) if subsets.counts_units else 1
                bound = spent + eager + replays(left, units_left, 2) * base + per_token * left
                last_but_one = math.inf
                if not far:
                    last = problem.cheapest_for_units(left, units_left)
                    on_replay = math.inf if last is None else spent + eager + last.cost
                    last_but_one = min(spent + problem.eager_time(plan.eager_tokens + left), on_replay)
                rate = budget.cost / (first_tokens + filled)
                self.moves.append(Move(rate, bound, last_but_one, choice, sums))
                room = filled - 1
                if room < 0:
                    break

    def _batch(self, choice: Choice, sums: tuple[int, int]) -> tuple[int, ...]:
        """The largest item and others of these sums; if they do not fit, what fits by descending tokens."""
        problem, subsets, budget, first = self._problem, self._subsets, choice.budget, self._rest.items[0]
        room = budget.tokens - self._first_tokens
        joined = subsets.items(*sums)
        # A grain of more than one token can make a sum too low.
        while (excess := sum([problem.tokens[i] for i in (first, *joined)]) - budget.tokens) > 0:
            room -= max(excess, subsets.grain)
            joined = subsets.items(*subsets.largest(room, choice.units - self._first_units)) if room > 0 else []
        batch = (first, *joined)
        if len(batch) <= budget.items and sum([problem.frames[i] for i in batch]) <= budget.frames:
            return batch
        return self._what_fits(budget)

    def _what_fits(self, budget: Budget) -> tuple[int, ...]:
        """Items by descending tokens, each that still fits."""
        problem = self._problem
        batch: list[int] = []
        tokens = frames = 0
        for i in self._rest.items:
            if tokens + problem.tokens[i] <= budget.tokens and frames + problem.frames[i] <= budget.frames:
                tokens += problem.tokens[i]
                frames += problem.frames[i]
                batch.append(i)
                if len(batch) == budget.items:
                    break
        return tuple(batch)
