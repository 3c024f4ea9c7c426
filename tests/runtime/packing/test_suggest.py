"""`suggest_budgets` against all choices of budgets, and its ladder without requests."""

import math
import random
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import pytest

from polyfuse.runtime.packing.suggest import suggest_budgets
from polyfuse.spec import SpecError


def replay(count: int) -> float:
    return 0.8e-3 + 15.7e-6 * count


@pytest.mark.parametrize("cost", [replay, lambda count: count * count, lambda count: 100 + count % 7])
@pytest.mark.parametrize("max_graphs", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("seed", range(5))
def test_suggested_budgets_are_the_best_choice(seed: int, max_graphs: int, cost: Callable[[int], float]):
    requests = random.Random(seed).choices(range(1, 30), k=17)

    def total(budgets: Sequence[int]) -> float:
        return sum(cost(min(budget for budget in budgets if budget >= count)) for count in requests)

    distinct = sorted(set(requests))
    choices = [(*chosen, distinct[-1]) for size in range(max_graphs) for chosen in combinations(distinct[:-1], size)]
    budgets = suggest_budgets(requests, smallest=1, largest=40, max_graphs=max_graphs, cost=cost)
    assert budgets in choices
    assert total(budgets) == pytest.approx(min(map(total, choices)), rel=1e-12)


def test_suggested_budgets_are_multiples_within_the_limits():
    requests = [3, 9, 90, 91, 130, 197, 250]
    assert suggest_budgets(requests, smallest=10, largest=199, multiple_of=4) == (12, 92, 132)
    assert suggest_budgets(requests, smallest=10, largest=200, multiple_of=4) == (12, 92, 132, 200)


def test_a_large_sample_has_all_budgets():
    budgets = suggest_budgets(range(1, 20_001, 10), largest=30_000)
    assert len(budgets) == 40
    assert budgets[-1] == 19_991


def test_a_ladder_is_geometric_and_not_too_fine():
    assert suggest_budgets(smallest=64, largest=4096, max_graphs=7) == (64, 128, 256, 512, 1024, 2048, 4096)
    assert suggest_budgets(smallest=60, largest=1000, max_graphs=4, multiple_of=16) == (64, 160, 400, 992)
    assert suggest_budgets(largest=4096, max_graphs=1) == (4096,)
    assert suggest_budgets(smallest=64, largest=64) == (64,)
    fine = suggest_budgets(smallest=1000, largest=10_000, max_graphs=1000)
    ratios = [b / a for a, b in pairwise(fine)]
    assert len(fine) == 40
    assert min(ratios) > 1.058
    assert max(ratios) < 1.064


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"smallest": 0}, "suggest_budgets: smallest: expected a number >= 1, got 0"),
        ({"max_graphs": 0}, "suggest_budgets: max_graphs: expected a number >= 1, got 0"),
        ({"multiple_of": 0}, "suggest_budgets: multiple_of: expected a number >= 1, got 0"),
        ({"largest": 63}, "suggest_budgets: largest: expected a multiple of multiple_of=1 from 64 on, got 63"),
        ({"largest": 70, "multiple_of": 48}, "expected a multiple of multiple_of=48 from 96 on, got 70"),
        ({"requests": [5, 0]}, "suggest_budgets: requests: expected total tokens >= 1, got 0"),
        ({"requests": [200]}, "requests: expected at least one request of at most 100 tokens, got 1 others"),
        ({"requests": []}, "requests: expected at least one request of at most 100 tokens, got 0 others"),
        (
            {"requests": [80], "cost": lambda count: math.nan},
            "suggest_budgets: cost: expected finite seconds >= 0, got nan for 80 tokens",
        ),
    ],
)
def test_bad_arguments_of_suggest_budgets(arguments: dict[str, object], message: str):
    with pytest.raises(SpecError, match=message):
        suggest_budgets(**{"largest": 100, **arguments})
