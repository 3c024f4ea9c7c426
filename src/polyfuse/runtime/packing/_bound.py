"""`LowerBound`: what the items left cost at least, from a straight line below the costs of all budgets."""

from itertools import pairwise

from polyfuse.runtime.packing._plans import PartialPlan
from polyfuse.runtime.packing._problem import Load, Problem

_SHARES = 16  # in which the tokens are divided between eager and replay


class LowerBound:
    """Bounds the cost of replays: each costs at least `base`, and each token in them `per_token`.

    Of the menu's lines it takes the one with the highest bound for a load that needs two replays or more.
    """

    def __init__(self, problem: Problem, load: Load) -> None:
        self._problem = problem
        self._most_tokens, self._most_units = problem.menu.tokens[-1], problem.limits.most_units
        replays = self.replays(load.tokens, load.units, 2)
        line = max(problem.menu.lines, key=lambda line: replays * line.base + line.per_token * load.tokens)
        self.base, self.per_token = line

    def replays(self, tokens: int, units: int, least: int) -> int:
        """How many replays so much needs, `least` or more."""
        return max(least, -(-tokens // self._most_tokens), -(-units // self._most_units))

    def excludes_better(self, start: PartialPlan, rest: Load, goal: float) -> bool:
        """Whether no plan for the rest with two replays or more, or with eager items and replays, is below `goal`.

        `start` has no replays. With eager items the bound is taken for each share of their tokens, between one item
        and all.
        """
        base, per_token = self.base, self.per_token
        replays = self.replays(rest.tokens, rest.units, 2)
        if start.eager_time + replays * base + per_token * rest.tokens < goal:
            return False
        low = self._problem.tokens[rest.items[-1]]
        shares = [low + (rest.tokens - low) * step // _SHARES for step in range(_SHARES + 1)]
        for least, most in pairwise(shares):
            time = self._problem.eager_time(start.eager_tokens + least) + base + per_token * (rest.tokens - most)
            if time < goal:
                return False
        return True
