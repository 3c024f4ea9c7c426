"""`TreeSearch`: the heuristic search for requests of many items, depth first and of bounded effort."""

import math

from polyfuse.runtime.packing._bound import LowerBound
from polyfuse.runtime.packing._node import Move, Node
from polyfuse.runtime.packing._plans import BestPlan, PartialPlan
from polyfuse.runtime.packing._problem import Problem

_EFFORT = 900  # of a whole search, about as many microseconds
_WIDTHS = (10, 4, 2)  # how many moves are followed at the first depths; further down it is one
_NEAR = 4  # with more replays to go, nodes look at few budgets
_LAST_PAIRS = 4  # how many moves are tried with all the others in one batch


class TreeSearch:
    """Looks for better plans and offers them to `best`.

    Every plan has a batch with the largest item. A node tries to fill that batch on each budget, and goes on with the
    items left. Plans of two batches are so found exactly, but for limits that are checked when a batch is filled.
    """

    def __init__(self, problem: Problem, bound: LowerBound, best: BestPlan) -> None:
        self._problem, self._bound, self._best = problem, bound, best
        self._effort = _EFFORT
        self._visited: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}  # least spent, by items left and eager

    def run(self, start: PartialPlan, items: tuple[int, ...]) -> None:
        """Complete `start`, with `items` by descending tokens still to serve, in the best ways found."""
        self._visit(start, items, depth=0, floor=0)

    def _visit(self, plan: PartialPlan, items: tuple[int, ...], depth: int, floor: int) -> None:
        """Complete a plan in the best ways found.

        Spends effort down to `floor`, half of it on the first move followed, half of the rest on the second, and so on.
        """
        best = self._best
        while True:
            node = self._expand(plan, items)
            if node is None:
                return
            self._try_last_pairs(node)
            goal = best.goal
            promising = [move for move in node.moves if move.bound < goal]
            promising.sort(key=lambda move: move.time_per_token)
            if not promising:
                return
            if depth < len(_WIDTHS):
                self._branch(node, promising[: _WIDTHS[depth]], depth, floor)
                return
            plan, items = node.follow(promising[0])

    def _expand(self, plan: PartialPlan, items: tuple[int, ...]) -> Node | None:
        """Offer the plan with the items in one batch; its node, or None if nothing else can be worth following."""
        best, bound = self._best, self._bound
        rest = self._problem.load(items)
        best.offer_finished(plan, rest)
        replays = bound.replays(rest.tokens, rest.units, 2)
        least = plan.spent + plan.eager_time + replays * bound.base + bound.per_token * rest.tokens
        if len(items) == 1 or least >= best.goal:
            return None
        if self._visited.get((items, plan.eager), math.inf) <= plan.spent:
            return None
        self._visited[items, plan.eager] = plan.spent
        node = Node(self._problem, bound, plan, rest, best.time, far=replays > _NEAR)
        self._effort -= node.effort
        return node

    def _try_last_pairs(self, node: Node) -> None:
        """Offer the most promising moves with all that they leave in one batch."""
        for move in sorted(node.moves, key=lambda move: move.last_but_one)[:_LAST_PAIRS]:
            if move.last_but_one >= self._best.time:
                break
            plan, left = node.follow(move)
            self._best.offer_finished(plan, self._problem.load(left))

    def _branch(self, node: Node, moves: list[Move], depth: int, floor: int) -> None:
        """Visit the first move, and the others while there is effort left and they are still promising."""
        for tried, move in enumerate(moves):
            if tried == 0 or (self._effort > floor and move.bound < self._best.goal):
                half = (self._effort + floor) // 2
                self._visit(*node.follow(move), depth + 1, half)
