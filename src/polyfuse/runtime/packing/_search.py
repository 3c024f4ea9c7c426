"""The search for the partition of a request's items that takes the least predicted time. Standard library only."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from polyfuse.runtime.packing._menu import Budget, Menu
from polyfuse.runtime.packing._subset_sums import Subsets

_EXACT_ITEMS = 8  # up to so many, all partitions are compared
_GAP = 1e-3  # a plan so near to a lower bound is good enough
_EFFORT = 900  # of the search for more items, about as many microseconds
_WIDTHS = (10, 4, 2)  # how many ways it follows at the first depths; further down one
_NEAR = 4  # with more replays to go, it looks at few budgets
_FAR_BUDGETS = 4
_MANY = 32
_PAIRS = 4  # how many promising pairs of batches it tries
_SUMS = 1000  # how many fillings it looks at, over all budgets, times the items
_MOST_SUMS = 5  # and for one budget
_STEPS = 16  # in which a bound over all shares of eager tokens is taken

Groups = tuple[tuple[tuple[int, ...], Budget | None], ...]


def greedy(sizes: Sequence[tuple[int, int]], budgets: Sequence[Budget]) -> Groups:
    """Items by ascending tokens, filled up to the largest budget's limits; the smallest budget for each batch."""
    ascending = sorted(budgets)
    most = ascending[-1] if ascending else Budget(0, 0, 0, 0.0)
    batches: list[list[int]] = []
    eager: list[int] = []
    held_tokens = held_frames = 0
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i][0]):
        tokens, frames = sizes[i]
        if tokens > most.tokens or frames > most.frames:
            eager.append(i)
            continue
        held_tokens, held_frames = held_tokens + tokens, held_frames + frames
        if not batches or held_tokens > most.tokens or held_frames > most.frames or len(batches[-1]) == most.items:
            batches.append([])
            held_tokens, held_frames = tokens, frames
        batches[-1].append(i)
    groups: list[tuple[tuple[int, ...], Budget | None]] = []
    for batch in batches:
        tokens, frames = sum([sizes[i][0] for i in batch]), sum([sizes[i][1] for i in batch])
        fits = (b for b in ascending if b.tokens >= tokens and b.items >= len(batch) and b.frames >= frames)
        groups.append((tuple(batch), next(fits)))
    return (*groups, (tuple(eager), None)) if eager else tuple(groups)


class _Rest(NamedTuple):
    """Items still to plan, by descending tokens, with their total tokens, units and frames."""

    items: tuple[int, ...]
    tokens: int
    units: int
    frames: int


class _Partial(NamedTuple):
    """A plan for some of the items: replays and what they cost, eager items and their tokens."""

    replays: Groups
    spent: float
    eager: tuple[int, ...]
    eager_tokens: int

    def groups(self, items: tuple[int, ...], budget: Budget | None) -> Groups:
        """The whole plan, with the other items on `budget`."""
        if budget is None:
            return (*self.replays, (self.eager + items, None))
        return (*self.replays, (items, budget), *(((self.eager, None),) if self.eager else ()))


class _Way(NamedTuple):
    """A way to serve the largest item left: with others of these sums on `budget`, or eager (`None`)."""

    rate: float  # seconds by token served
    bound: float  # of the whole plan, if the others need more than one batch
    pair: float  # the whole plan's time, if the others need one batch
    budget: Budget | None
    limit: int
    sums: tuple[int, int]


class Search:
    """The best plan of a request so far, `groups` that take `cost` seconds, and the search for a better one.

    Every plan has a batch with the largest item. For each budget the search fills that batch up to the budget, as
    subset sums tell, and goes on with the items left; two batches are so planned exactly but for limits. A line below
    the costs of all budgets bounds what is left from below.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], menu: Menu, eager: Callable[[int], float]) -> None:
        self._menu, self._sizes = menu, sizes
        self._eager_time = eager
        self._tokens = [tokens for tokens, _ in sizes]
        self._frames = [frames for _, frames in sizes]
        self._items = tuple(sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], i)))
        self.groups: Groups = ((self._items, None),)
        self.cost = eager(sum(self._tokens))
        self._effort = _EFFORT
        self._visited: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}

    def run(self) -> Groups:
        """Search, and return the best plan found."""
        fits = {i: self._menu.cheapest(self._tokens[i], 1, self._frames[i]) is not None for i in self._items}
        if not any(fits.values()):
            return self.groups
        self._limit_units()
        away = tuple([i for i in self._items if not fits[i]])
        start = _Partial((), 0.0, away, sum([self._tokens[i] for i in away]))
        rest = self._rest(tuple([i for i in self._items if fits[i]]))
        self._offer(start, rest)
        if len(rest.items) == 1:
            return self.groups
        replays = self._replays(rest.tokens, rest.units, 2)
        self._line = max(self._menu.lines, key=lambda line: replays * line[0] + line[1] * rest.tokens)
        exact = len(rest.items) <= _EXACT_ITEMS
        if not self._settled(start, rest, self.cost * (1 if exact else 1 - _GAP)):
            if exact:
                self._enumerate(start, rest.items)
            else:
                self._visit(start, rest.items, 0, 0)
                self._offergreedy()
        return self.groups

    def _eager(self, tokens: int) -> float:
        return self._eager_time(tokens) if tokens else 0.0

    def _rest(self, items: tuple[int, ...]) -> _Rest:
        frames = sum([self._frames[i] for i in items]) if self._mixed else len(items) * self._least_frames
        return _Rest(items, sum([self._tokens[i] for i in items]), frames if self._by_frames else len(items), frames)

    def _limit_units(self) -> None:
        """Choose what is limited besides tokens: items, or frames where items differ and may have too many."""
        frames, budgets = self._frames, self._menu.budgets
        few, many = min(frames), max(frames)
        largest = budgets[-1]
        self._by_frames = few < many and sum(frames) * largest.items > len(frames) * largest.frames
        self._least_frames, self._mixed = few, few < many
        self._units = frames if self._by_frames else [1] * len(frames)
        if self._by_frames:
            limits = [b.frames for b in budgets]
        elif few == many:
            limits = [min(b.items, b.frames // few) for b in budgets]
        else:
            limits = [b.items for b in budgets]
        self._choices = list(zip(budgets, limits, strict=True))
        self._most_tokens, self._most_units, self._least_units = self._menu.tokens[-1], max(limits), min(limits)
        self._uneven = self._least_units < max(self._units) or min([b.frames for b in budgets]) < many

    @staticmethod
    def _rate(choice: tuple[Budget, int]) -> float:
        return choice[0].cost / choice[0].tokens

    def _replays(self, tokens: int, units: int, least: int) -> int:
        """How many replays so much needs at least."""
        return max(least, -(-tokens // self._most_tokens), -(-units // self._most_units))

    def _settled(self, start: _Partial, rest: _Rest, goal: float) -> bool:
        """Whether no plan with two replays, or with a replay and further eager items, can be below `goal`."""
        a, b = self._line
        replays = self._replays(rest.tokens, rest.units, 2)
        if self._eager(start.eager_tokens) + replays * a + b * rest.tokens < goal:
            return False
        low = self._tokens[rest.items[-1]]
        steps = [low + (rest.tokens - low) * step // _STEPS for step in range(_STEPS + 1)]
        return all(
            self._eager(start.eager_tokens + least) + a + b * (rest.tokens - most) >= goal
            for least, most in pairwise(steps)
        )

    def _offer(self, plan: _Partial, rest: _Rest) -> None:
        """Complete a plan with the rest in one batch, eager or a replay."""
        cost = plan.spent + self._eager(plan.eager_tokens + rest.tokens)
        if cost < self.cost:
            self.cost, self.groups = cost, plan.groups(rest.items, None)
        budget = self._menu.cheapest(rest.tokens, len(rest.items), rest.frames)
        if budget is not None:
            cost = plan.spent + self._eager(plan.eager_tokens) + budget.cost
            if cost < self.cost:
                self.cost, self.groups = cost, plan.groups(rest.items, budget)

    def _offergreedy(self) -> None:
        """Take the greedy batches, each on its cheapest budget, where the search found nothing better."""
        groups: list[tuple[tuple[int, ...], Budget | None]] = []
        cost = 0.0
        for items, budget in greedy(self._sizes, self._menu.budgets):
            rest = self._rest(items)
            if budget is not None:
                budget = self._menu.cheapest(rest.tokens, len(items), rest.frames)
            groups.append((items, budget))
            cost += self._eager(rest.tokens) if budget is None else budget.cost
        if cost < self.cost:
            self.cost, self.groups = cost, tuple(groups)

    def _enumerate(self, start: _Partial, items: tuple[int, ...]) -> None:
        """The best of all partitions, by dynamic programming over the subsets of `items` as bit masks."""
        size = 1 << len(items)
        tokens, frames = [0] * size, [0] * size
        alone: list[Budget | None] = [None] * size
        costs, least, first = [math.inf] * size, [0.0] * size, [0] * size
        for mask in range(1, size):
            others = mask & (mask - 1)
            i = items[(mask ^ others).bit_length() - 1]
            tokens[mask] = tokens[others] + self._tokens[i]
            frames[mask] = frames[others] + self._frames[i]
            budget = alone[mask] = self._menu.cheapest(tokens[mask], mask.bit_count(), frames[mask])
            if budget is not None:
                costs[mask] = budget.cost
            best, replay, part = costs[mask], mask, others
            while part:
                cost = least[part] + costs[mask ^ part]
                if cost < best:
                    best, replay = cost, mask ^ part
                part = (part - 1) & others
            least[mask], first[mask] = best, replay
        eager = None
        for mask in range(size):
            if least[size - 1 - mask] < self.cost:
                cost = least[size - 1 - mask] + self._eager(start.eager_tokens + tokens[mask])
                if cost < self.cost:
                    self.cost, eager = cost, mask
        if eager is None:
            return
        groups = []
        left = size - 1 - eager
        while left:
            groups.append((_members(items, first[left]), alone[first[left]]))
            left ^= first[left]
        away = start.eager + _members(items, eager)
        self.groups = (*groups, (away, None)) if away else tuple(groups)

    def _visit(self, plan: _Partial, items: tuple[int, ...], depth: int, floor: int) -> None:
        """Complete a plan in the best ways found, depth first over what serves the largest of `items`.

        Spends effort down to `floor`, half of it on the first way followed, half of the rest on the second, and so on.
        """
        while True:
            rest = self._rest(items)
            self._offer(plan, rest)
            replays = self._replays(rest.tokens, rest.units, 2)
            a, b = self._line
            bound = plan.spent + self._eager(plan.eager_tokens) + replays * a + b * rest.tokens
            if len(items) == 1 or bound >= self.cost * (1 - _GAP):
                return
            if self._visited.get((items, plan.eager), math.inf) <= plan.spent:
                return
            self._visited[items, plan.eager] = plan.spent
            ways, subsets = self._ways(plan, rest, replays > _NEAR)
            for way in sorted(ways, key=lambda way: way.pair)[:_PAIRS]:
                if way.pair >= self.cost:
                    break
                pair, left = self._follow(plan, items, way, subsets)
                self._offer(pair, self._rest(left))
            goal = self.cost * (1 - _GAP)
            promising = sorted([way for way in ways if way.bound < goal], key=lambda way: way.rate)
            if not promising:
                return
            if depth < len(_WIDTHS):
                for tried, way in enumerate(promising[: _WIDTHS[depth]]):
                    if tried == 0 or (self._effort > floor and way.bound < self.cost * (1 - _GAP)):
                        half = (self._effort + floor) // 2
                        self._visit(*self._follow(plan, items, way, subsets), depth + 1, half)
                return
            plan, items = self._follow(plan, items, promising[0], subsets)

    def _ways(self, plan: _Partial, rest: _Rest, far: bool) -> tuple[list[_Way], Subsets]:
        """Ways to serve the largest item that may lead below the best cost; only a few if the end is `far`."""
        a, b = self._line
        first = rest.items[0]
        token, unit = self._tokens[first], self._units[first]
        tokens, units = rest.tokens - token, rest.units - unit
        choices = self._choices[bisect_left(self._menu.tokens, token) :]
        if self._uneven:
            choices = [choice for choice in choices if choice[1] >= unit and choice[0].frames >= self._frames[first]]
        subsets, fullest = self._subsets(rest, choices, far)
        if far:
            end = bisect_left(choices, token + fullest, key=lambda choice: choice[0].tokens)
            best = sorted(choices[:end], key=self._rate)[: _FAR_BUDGETS - 1]
            choices = [*best, min(choices[end:], key=lambda choice: choice[0].cost)]
        eager, with_first = self._eager(plan.eager_tokens), self._eager(plan.eager_tokens + token)
        bound = plan.spent + with_first + self._replays(tokens, units, 1) * a + tokens * b
        ways = [_Way((with_first - eager) / token, bound, math.inf, None, 0, (0, 0))]
        eager_least = self._eager(plan.eager_tokens + max(1, tokens - fullest))
        sums_each = 1 if far else max(1, min(_MOST_SUMS, _SUMS // (len(choices) * len(rest.items))))
        found: dict[tuple[int, int], Budget] = {}
        for budget, limit in choices:
            if budget.tokens >= rest.tokens and budget.items >= len(rest.items) and budget.frames >= rest.frames:
                continue
            spent = plan.spent + budget.cost
            room = budget.tokens - token
            for _ in range(sums_each):
                sums = subsets.largest(room, limit - unit)
                other = found.setdefault(sums, budget)
                if other.cost < budget.cost and other.items >= budget.items and other.frames >= budget.frames:
                    break
                filled = sums[0] * subsets.grain
                left, units_left = max(1, tokens - filled), max(1, units - sums[1]) if subsets.counted else 1
                if spent + min(eager + a + b * left, eager_least) >= self.cost:
                    break
                bound = spent + eager + self._replays(left, units_left, 2) * a + b * left
                pair = math.inf
                if not far:
                    last = self._hold(left, units_left)
                    pair = spent + self._eager(plan.eager_tokens + left)
                    if last is not None:
                        pair = min(pair, spent + eager + last.cost)
                ways.append(_Way(budget.cost / (token + filled), bound, pair, budget, limit, sums))
                room = filled - 1
                if room < 0:
                    break
        self._effort -= 40 + 3 * len(ways) + (4 if subsets.counted else 2) * len(rest.items)
        return ways, subsets

    def _subsets(self, rest: _Rest, choices: Sequence[tuple[Budget, int]], far: bool) -> tuple[Subsets, int]:
        """The sums that can join the largest item on one of the budgets, and the most tokens among them."""
        token, unit = self._tokens[rest.items[0]], self._units[rest.items[0]]
        others = rest.items[1:]
        room = min(choices[-1][0].tokens, rest.tokens) - token
        most = min(self._most_units, rest.units) - unit
        counted = self._least_units < rest.units
        if counted and not self._by_frames:
            smallest = list(accumulate([self._tokens[i] for i in reversed(rest.items)]))
            counted = any(limit < rest.units and smallest[limit] <= budget.tokens for budget, limit in choices)
            most = min(most, bisect_right(smallest, choices[-1][0].tokens))
            room = min(room, sum([self._tokens[i] for i in others[:most]]))
        if far and len(others) > _MANY:  # half of them fill one of many replays well enough
            others = others[::2]
        subsets = Subsets(self._tokens, self._units, others, room, most if counted else None)
        return subsets, subsets.largest(room, most)[0] * subsets.grain

    def _hold(self, tokens: int, units: int) -> Budget | None:
        """The cheapest budget that may hold so much."""
        items, frames = (1, units) if self._by_frames else (units, units * self._least_frames)
        return self._menu.cheapest(tokens, items, frames)

    def _follow(
        self, plan: _Partial, items: tuple[int, ...], way: _Way, subsets: Subsets
    ) -> tuple[_Partial, tuple[int, ...]]:
        """The plan with one more batch, and what is left."""
        if way.budget is None:
            tokens = plan.eager_tokens + self._tokens[items[0]]
            return _Partial(plan.replays, plan.spent, (*plan.eager, items[0]), tokens), items[1:]
        chosen = self._fill(items, way.budget, way.limit, way.sums, subsets)
        inside = set(chosen)
        replays = (*plan.replays, (chosen, way.budget))
        extended = _Partial(replays, plan.spent + way.budget.cost, plan.eager, plan.eager_tokens)
        return extended, tuple([i for i in items if i not in inside])

    def _fill(
        self, items: tuple[int, ...], budget: Budget, limit: int, sums: tuple[int, int], subsets: Subsets
    ) -> tuple[int, ...]:
        """The first item and others of these sums; if they do not fit, what fits by descending tokens."""
        room = budget.tokens - self._tokens[items[0]]
        joined = subsets.items(*sums)
        while (excess := sum([self._tokens[i] for i in (items[0], *joined)]) - budget.tokens) > 0:
            room -= max(excess, subsets.grain)
            joined = subsets.items(*subsets.largest(room, limit - self._units[items[0]])) if room > 0 else []
        chosen = [items[0], *joined]
        if len(chosen) <= budget.items and sum([self._frames[i] for i in chosen]) <= budget.frames:
            return tuple(chosen)
        chosen = []
        tokens = frames = 0
        for i in items:
            if tokens + self._tokens[i] <= budget.tokens and frames + self._frames[i] <= budget.frames:
                tokens += self._tokens[i]
                frames += self._frames[i]
                chosen.append(i)
                if len(chosen) == budget.items:
                    break
        return tuple(chosen)


def _members(items: Sequence[int], mask: int) -> tuple[int, ...]:
    return tuple([item for j, item in enumerate(items) if mask >> j & 1])
