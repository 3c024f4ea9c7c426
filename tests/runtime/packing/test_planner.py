"""`plan_packing` against all partitions, against bounds and the greedy policy, and on a trace."""

import math
import random
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polyfuse.bench.traces import synthetic_trace, tokens
from polyfuse.runtime.packing.planner import Batch, Budget, plan_packing, predicted_time, suggest_budgets
from polyfuse.spec import SpecError

Sizes = Sequence[tuple[int, int]]


def replay(count: int) -> float:
    return 0.8e-3 + 15.7e-6 * count


def slow_eager(count: int) -> float:
    return 3e-3 + 15.7e-6 * count


def never(count: int) -> float:
    return math.inf


def budgets_of(counts: Sequence[int], items: int = 1000, frames: int = 1000) -> list[Budget]:
    return [Budget(count, items, frames, replay(count)) for count in counts]


POWERS = budgets_of([64 * 2**i for i in range(8)])
FINE = budgets_of(suggest_budgets(largest=4864))


def trace_images(count: int, seed: int) -> list[tuple[int, int]]:
    images = [(tokens(grid), grid[0]) for request in synthetic_trace(count, seed) for grid in request]
    return random.Random(seed).sample(images, count)


def check(batches: Sequence[Batch], sizes: Sizes) -> None:
    """Every item once, within the limits, one eager batch, in order."""
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(sizes)))
    assert [batch.indices[0] for batch in batches] == sorted(batch.indices[0] for batch in batches)
    assert sum(batch.budget is None for batch in batches) <= 1
    for indices, budget in batches:
        assert list(indices) == sorted(indices)
        if budget is not None:
            assert sum(sizes[i][0] for i in indices) <= budget.tokens
            assert len(indices) <= budget.items
            assert sum(sizes[i][1] for i in indices) <= budget.frames


def alone(sizes: Sizes, items: Sequence[int], budgets: Sequence[Budget]) -> float:
    count, frames = sum(sizes[i][0] for i in items), sum(sizes[i][1] for i in items)
    fits = (b.cost for b in budgets if b.tokens >= count and b.items >= len(items) and b.frames >= frames)
    return min(fits, default=math.inf)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i, part in enumerate(rest):
            yield [*rest[:i], [items[0], *part], *rest[i + 1 :]]


def least_time(sizes: Sizes, budgets: Sequence[Budget], eager: Callable[[int], float]) -> float:
    """Over all partitions, with each of the parts eager, or none."""
    best = math.inf
    for parts in partitions(list(range(len(sizes)))):
        times = [alone(sizes, part, budgets) for part in parts]
        best = min(best, sum(times))
        for i, part in enumerate(parts):
            others = sum(times[:i] + times[i + 1 :])
            best = min(best, others + eager(sum(sizes[j][0] for j in part)))
    return best


def least_time_by_subsets(sizes: Sizes, budgets: Sequence[Budget], eager: Callable[[int], float]) -> float:
    """The same for more items, by dynamic programming over subsets."""
    full = (1 << len(sizes)) - 1
    members = [[i for i in range(len(sizes)) if mask >> i & 1] for mask in range(full + 1)]
    one = [alone(sizes, items, budgets) for items in members]
    least = [0.0] + [math.inf] * full
    for mask in range(1, full + 1):
        others = mask & (mask - 1)
        best, part = one[mask], others
        while part:
            if one[mask ^ part] + least[part] < best:
                best = one[mask ^ part] + least[part]
            part = (part - 1) & others
        least[mask] = best
    mixed = (least[full ^ mask] + eager(sum(sizes[i][0] for i in members[mask])) for mask in range(1, full + 1))
    return min(least[full], *mixed)


def test_two_replays_where_the_greedy_fill_takes_three():
    sizes = [(30, 1), (30, 1), (34, 1), (34, 1)]
    budget = Budget(64, 8, 8, 1e-3)
    assert plan_packing(sizes, [budget], never, policy="greedy") == [
        Batch((0, 1), budget),
        Batch((2,), budget),
        Batch((3,), budget),
    ]
    batches = plan_packing(sizes, [budget], never)
    check(batches, sizes)
    assert [batch.budget for batch in batches] == [budget, budget]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        pytest.param([100, 20], [((0, 1), 128)], id="one replay"),
        pytest.param([128, 20], [((0,), 128), ((1,), 64)], id="two small replays before a large one"),
        pytest.param([260, 10], [((0, 1), None)], id="eager before a large replay"),
        pytest.param([64, 2000], [((0,), 64), ((1,), None)], id="what fits no budget is eager"),
        pytest.param([2000, 64, 2000], [((0, 2), None), ((1,), 64)], id="one eager batch"),
        pytest.param([20, 2000], [((0, 1), None)], id="eager with another rather than a replay"),
    ],
)
def test_the_cheapest_way(sizes: list[int], expected: list[tuple[tuple[int, ...], int | None]]):
    budgets = [Budget(64, 9, 9, 1.0), Budget(128, 9, 9, 2.0), Budget(256, 9, 9, 4.0), Budget(1024, 9, 9, 16.0)]
    batches = plan_packing([(count, 1) for count in sizes], budgets, lambda count: 3 + count / 40)
    assert [(batch.indices, batch.budget and batch.budget.tokens) for batch in batches] == expected


def test_greedy_fills_the_largest_budget_and_takes_the_smallest_that_holds_a_batch():
    budgets = [Budget(100, 2, 9, 1.0), Budget(50, 2, 9, 5.0)]
    sizes = [(20, 1), (101, 1), (10, 1), (5, 1), (95, 1), (15, 10)]
    assert plan_packing(sizes, budgets, never, policy="greedy") == [
        Batch((0,), budgets[1]),
        Batch((1, 5), None),
        Batch((2, 3), budgets[1]),
        Batch((4,), budgets[0]),
    ]


@pytest.mark.parametrize("policy", ["optimal", "greedy"])
def test_without_budgets_all_is_eager(policy: str):
    assert plan_packing([(5, 1), (9, 2)], [], slow_eager, policy=policy) == [Batch((0, 1), None)]


a_size = st.tuples(st.integers(1, 100), st.sampled_from([1, 1, 1, 2, 4]))
a_budget = st.builds(
    Budget,
    st.integers(20, 300),
    st.sampled_from([1, 2, 3, 9]),
    st.sampled_from([2, 4, 8, 99]),
    st.integers(0, 300).map(float),
)
an_eager = st.sampled_from([never, lambda count: 50 + count, lambda count: 2 * count, lambda count: 150 + count // 2])


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.lists(a_size, min_size=1, max_size=7), st.lists(a_budget, max_size=4), an_eager)
def test_few_items_have_the_best_of_all_partitions(sizes: Sizes, budgets: list[Budget], eager: Callable[[int], float]):
    batches = plan_packing(sizes, budgets, eager)
    check(batches, sizes)
    assert predicted_time(batches, sizes, eager) == pytest.approx(least_time(sizes, budgets, eager), rel=1e-12)


@pytest.mark.parametrize("eager", [never, slow_eager])
@pytest.mark.parametrize(
    "budgets",
    [
        pytest.param(FINE, id="40 budgets"),
        pytest.param(FINE[:28], id="28 budgets up to 1,400 tokens"),
        pytest.param(POWERS, id="powers of two"),
        pytest.param([b._replace(items=4) for b in FINE], id="4 items"),
        pytest.param([b._replace(items=max(1, b.tokens // 150)) for b in FINE], id="items by tokens"),
    ],
)
@pytest.mark.parametrize(("count", "seed"), [(9, 0), (10, 1), (11, 2), (12, 3), (12, 4)])
def test_more_items_are_within_one_percent(count: int, seed: int, budgets: list[Budget], eager: Callable[[int], float]):
    sizes = trace_images(count, seed)
    batches = plan_packing(sizes, budgets, eager)
    check(batches, sizes)
    assert predicted_time(batches, sizes, eager) <= 1.01 * least_time_by_subsets(sizes, budgets, eager)


@pytest.mark.parametrize(
    ("budgets", "least_replays"),
    [
        pytest.param(FINE, lambda total: total / 4864, id="tokens bind"),
        pytest.param(FINE[:28], lambda total: total / FINE[27].tokens, id="totals far above the largest"),
        pytest.param([b._replace(items=12) for b in FINE], lambda total: 64 / 12, id="items bind"),
        pytest.param([b._replace(frames=12) for b in FINE], lambda total: 64 / 12, id="frames bind"),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_many_items_are_near_a_lower_bound(seed: int, budgets: list[Budget], least_replays: Callable[[int], float]):
    sizes = trace_images(64, seed)
    total = sum(count for count, _ in sizes)
    batches = plan_packing(sizes, budgets, never)
    check(batches, sizes)
    bound = 0.8e-3 * math.ceil(least_replays(total)) + 15.7e-6 * total
    assert predicted_time(batches, sizes, never) <= 1.02 * bound


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@example(
    [(19, 1), (14, 1), (2, 3), (17, 1), (14, 1), (21, 1), (30, 1), (25, 1), (10, 2), (10, 1)],
    [Budget(487, 5, 5, 4.0), Budget(168, 5, 2, 18.0), Budget(73, 1, 99, 3.0)],
    never,
)
@given(st.lists(a_size, min_size=9, max_size=40), st.lists(a_budget, max_size=5), an_eager)
def test_many_items_are_never_slower_than_greedy(sizes: Sizes, budgets: list[Budget], eager: Callable[[int], float]):
    batches, greedy = (plan_packing(sizes, budgets, eager, policy=policy) for policy in ("optimal", "greedy"))
    check(batches, sizes)
    check(greedy, sizes)
    assert predicted_time(batches, sizes, eager) <= predicted_time(greedy, sizes, eager) * (1 + 1e-12)
    assert plan_packing(sizes, budgets, eager) == batches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": []}, "plan_packing: sizes: expected at least one item, got none"),
        ({"sizes": [(4, 1), (0, 1)]}, r"plan_packing: sizes\[1\]: expected tokens and frames >= 1, got \(0, 1\)"),
        ({"sizes": [(4, 0)]}, r"plan_packing: sizes\[0\]: expected tokens and frames >= 1, got \(4, 0\)"),
        ({"policy": "best"}, "plan_packing: policy: expected optimal or greedy, got 'best'"),
        (
            {"budgets": [Budget(0, 1, 1, 1.0)]},
            r"plan_packing: budgets\[0\]: expected tokens, items and frames >= 1, got \(0, 1, 1, 1.0\)",
        ),
        ({"budgets": [Budget(1, 0, 1, 1.0)]}, "tokens, items and frames >= 1"),
        ({"budgets": [Budget(1, 1, 0, 1.0)]}, "tokens, items and frames >= 1"),
        (
            {"budgets": [Budget(1, 1, 1, math.nan)]},
            r"plan_packing: budgets\[0\]: expected a finite cost >= 0, got \(1, 1, 1, nan\)",
        ),
        ({"budgets": [Budget(1, 1, 1, math.inf)]}, "a finite cost >= 0"),
        ({"budgets": [Budget(1, 1, 1, -1.0)]}, "a finite cost >= 0"),
    ],
)
def test_bad_requests_and_budgets(arguments: dict[str, object], message: str):
    good = {"sizes": [(4, 1)], "budgets": [Budget(64, 8, 8, 1.0)], "eager": slow_eager}
    with pytest.raises(SpecError, match=message):
        plan_packing(**{**good, **arguments})


def test_predicted_time_adds_replays_and_eager_batches():
    batches = [Batch((0, 2), None), Batch((1,), Budget(64, 8, 8, 0.25))]
    assert predicted_time(batches, [(10, 1), (20, 1), (30, 1)], lambda count: count / 8) == 5.25


@pytest.mark.parametrize("eager", [never, slow_eager])
def test_a_trace_takes_hardly_longer_than_at_exact_size(eager: Callable[[int], float]):
    sample, trace = (
        [[(tokens(grid), grid[0]) for grid in request] for request in synthetic_trace(2000, seed)] for seed in (1, 0)
    )

    def totals(requests: list[list[tuple[int, int]]]) -> list[int]:
        return [sum(count for count, _ in request) for request in requests]

    def time(budgets: list[Budget], policy: str) -> float:
        return sum(predicted_time(plan_packing(sizes, budgets, eager, policy=policy), sizes, eager) for sizes in trace)

    exact = sum(map(replay, totals(trace)))
    assert time(budgets_of(suggest_budgets(totals(sample), largest=4864, max_graphs=40)), "optimal") <= 1.03 * exact
    assert time(POWERS, "greedy") > 1.3 * exact
