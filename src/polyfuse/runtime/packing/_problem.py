"""`Problem`: one request's items and the limits that bind them, in the form that the search works on."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from polyfuse.runtime.packing._menu import Budget, Menu


class Choice(NamedTuple):
    """A budget that the search can fill, and how many units it holds."""

    budget: Budget
    units: int


class UnitLimits(NamedTuple):
    """The budgets in order of tokens, with the most and the least that they hold."""

    choices: tuple[Choice, ...]
    most_units: int
    least_units: int
    least_frames: int


@lru_cache(maxsize=256)
def _unit_limits(menu: Menu, counts_frames: bool, frames_of_each: int | None) -> UnitLimits:
    """What the budgets hold, in units of frames or of items; `frames_of_each` is the frames of every item, if equal."""
    budgets = menu.budgets
    if counts_frames:
        limits = [budget.frames for budget in budgets]
    elif frames_of_each is None:
        limits = [budget.items for budget in budgets]
    else:
        limits = [min(budget.items, budget.frames // frames_of_each) for budget in budgets]
    choices = tuple(map(Choice, budgets, limits))
    return UnitLimits(choices, max(limits), min(limits), min(budget.frames for budget in budgets))


class Load(NamedTuple):
    """Items by descending tokens, with their total tokens, units and frames."""

    items: tuple[int, ...]
    tokens: int
    units: int
    frames: int


class Problem:
    """A request of which at least one item fits a budget; lists are indexed by item.

    Subset sums can respect one limit besides that of the tokens, which is counted in *units*: one for each item, or an
    item's frames if items differ in them and the largest budget runs out of frames before it runs out of items. The
    third limit is checked when a batch is filled.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], menu: Menu, eager: Callable[[int], float]) -> None:
        self.sizes, self.menu = sizes, menu
        self._eager = eager
        self.tokens = [tokens for tokens, _ in sizes]
        self.frames = [frames for _, frames in sizes]
        largest = menu.budgets[-1]
        self.least_frames, most_frames = min(self.frames), max(self.frames)
        self.frames_differ = self.least_frames < most_frames
        frames_run_out = sum(self.frames) * largest.items > len(sizes) * largest.frames
        self.counts_frames = self.frames_differ and frames_run_out
        self.units = self.frames if self.counts_frames else [1] * len(sizes)
        self.limits = _unit_limits(menu, self.counts_frames, None if self.frames_differ else self.least_frames)
        # Whether an item can fit a budget's tokens, but not its other limits.
        self.may_exclude_one = self.limits.least_units < max(self.units) or self.limits.least_frames < most_frames

    def eager_time(self, tokens: int) -> float:
        """Seconds of an eager batch of so many tokens; nothing for no tokens."""
        return self._eager(tokens) if tokens else 0.0

    def load(self, items: tuple[int, ...]) -> Load:
        """The totals of items, which are by descending tokens."""
        tokens = sum([self.tokens[i] for i in items])
        frames = sum([self.frames[i] for i in items]) if self.frames_differ else len(items) * self.least_frames
        return Load(items, tokens, frames if self.counts_frames else len(items), frames)

    def cheapest_for_units(self, tokens: int, units: int) -> Budget | None:
        """The cheapest budget that may hold items of so many tokens and units: a lower bound, as far as is known."""
        if self.counts_frames:
            return self.menu.cheapest(tokens, 1, units)
        return self.menu.cheapest(tokens, units, units * self.least_frames)
