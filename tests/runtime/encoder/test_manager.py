"""`EncoderGraphManager` on a small encoder of known outputs, without graphs but with their buffers and padding."""

import re
import threading
import warnings
from collections import Counter
from typing import Any

import pytest
import torch

from polyfuse import SpecError
from polyfuse.runtime.encoder.protocol import Capacity, EncoderRequest, ItemSize
from tests.runtime.encoder.doubler import Doubler, check, items, manager

NAN = float("nan")


@pytest.mark.parametrize("policy", ["optimal", "greedy"])
@pytest.mark.parametrize("tokens", [(5,), (16,), (30, 30, 34, 34), (1, 63, 2, 8, 8, 8, 40), (7,) * 21])
def test_results_are_every_items_own_in_order(tokens: tuple[int, ...], policy: str) -> None:
    made, given = manager([16, 64], policy=policy), items(*tokens)
    check(made.execute(given), given)
    stats = made.stats
    assert (stats.requests, stats.items, stats.eager_batches, stats.tokens) == (1, len(tokens), 0, sum(tokens))
    assert stats.padding == sum(budget * n for budget, n in stats.replays.items()) - sum(tokens)


def test_packing_takes_fewer_replays_than_greedy() -> None:
    given = items(30, 30, 34, 34)
    counts = {}
    for policy in ("optimal", "greedy"):
        made = manager([64], policy=policy)
        made.execute(given)
        counts[policy] = made.stats.replays
    assert counts == {"optimal": Counter({64: 2}), "greedy": Counter({64: 3})}


def test_what_padding_holds_reaches_no_result() -> None:
    made, given = manager([64], max_items=4), items(30, 20)
    made.capture()
    for buffer in made._inputs.values():
        if buffer.is_floating_point():
            buffer.fill_(NAN)
    check(made.execute(given), given)


def test_a_smaller_batch_after_a_larger_one() -> None:
    made = manager([64])
    for given in (items(10, 20, 30), items(4), items(9, 9, seed=1)):
        check(made.execute(given), given)


def test_results_are_the_callers_own() -> None:
    made, given = manager([16]), items(8, 3)
    first = made.execute(given)
    made.execute(items(8, 3, seed=1))
    check(first, given)
    first["rows"].fill_(NAN)
    check(made.execute(given), given)


@pytest.mark.parametrize("indices", [[2, 0], [1], [0, 1, 2, 3], [3, 1, 2]])
@pytest.mark.parametrize("eager", [100.0, 0.0], ids=["replayed", "eager"])
def test_some_of_the_items(indices: list[int], eager: float) -> None:
    made, given = manager([32], eager=eager), items(4, 6, 10, 3)
    check(made.run(made.encoder.request(given), indices), [given[i] for i in indices])
    assert made.stats.eager_batches == (eager == 0.0)


def test_what_fits_no_budget_runs_eagerly() -> None:
    made, given = manager([16]), items(3, 17, 4)
    check(made.execute(given), given)
    stats = made.stats
    assert (stats.eager_batches, stats.eager_items, stats.replays) == (1, 1, Counter({16: 1}))
    assert made.encoder.calls[-1] in (Capacity(17, 1, 1), Capacity(16, 16, 16))


def test_eager_wins_when_it_is_faster() -> None:
    made, given = manager([64], eager=0.0), items(3)
    check(made.execute(given), given)
    assert (made.stats.eager_items, made.stats.replays) == (1, Counter())


def test_more_items_than_a_budget_holds() -> None:
    made, given = manager([2, 16], max_items=4), items(*(1,) * 9)
    check(made.execute(given), given)
    assert sum(made.stats.replays.values()) >= 3


def test_budgets_need_not_divide_by_the_items() -> None:
    made, given = manager([7, 13], max_items=5), items(2, 2, 2, 7, 6, 6)
    check(made.execute(given), given)


def test_frames_limit_a_replay() -> None:
    made, given = manager([64], max_frames=8), items(10, 10, 10)
    check(made.execute(given, [8, 4, 4]), given)
    assert made.stats.replays == Counter({64: 2})
    check(made.execute(given), given)  # images on a graph captured for videos
    with pytest.raises(SpecError, match=re.escape("Doubler: frames: expected at most max_frames=8 in an item, got 9")):
        made.execute(given, [1, 9, 1])
    assert made.stats.requests == 2


def test_none_of_the_items() -> None:
    for settings in ({}, {"max_frames": 8}):
        made = manager([64], **settings)
        with pytest.raises(SpecError, match="sizes: expected at least one item, got none"):
            made.run(made.encoder.request(items(4)), [])


def test_without_a_frame_limit_a_long_video_runs_eagerly() -> None:
    made, given = manager([80], max_items=4), items(80)
    check(made.execute(given, [65]), given)
    check(made.execute(given, [64]), given)
    assert (made.stats.eager_items, made.stats.replays) == (1, Counter({80: 1}))


def test_several_threads() -> None:
    made = manager([16, 64])
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in range(20):
                given = items(1 + n, 5, 30 - n, seed=seed * 100 + n)
                check(made.execute(given), given)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert made.stats.requests == 80


def broken_requests() -> dict[str, tuple[Any, str]]:
    good = Doubler().request(items(3, 4))
    rows, size = good.tensors["rows"], good.tensors["size"]
    return {
        "no items": (EncoderRequest((), good.tensors), "request: expected at least one item, got none"),
        "empty item": (
            good._replace(sizes=(ItemSize(0), ItemSize(7))),
            "request: expected items of at least one token and one frame, got (0, 1)",
        ),
        "rows": (
            good._replace(tensors={"rows": rows[1:], "size": size}),
            "rows: expected shape [14, 3] for these items, got [13, 3]",
        ),
        "missing": (good._replace(tensors={"rows": rows}), "request: expected tensors rows, size, got rows"),
    }


@pytest.mark.parametrize("kind", broken_requests())
def test_bad_requests_change_nothing(kind: str) -> None:
    request, message = broken_requests()[kind]
    made = manager([16])
    made.execute(items(5))
    before = {name: buffer.clone() for name, buffer in made._inputs.items()}
    with pytest.raises(SpecError, match=re.escape("Doubler: " + message)):
        made.run(request)
    assert made.stats.requests == 1
    assert all(torch.equal(before[name], buffer) for name, buffer in made._inputs.items())


def test_inference_mode_at_first_use() -> None:
    made, given = manager([16]), items(5)
    with torch.inference_mode():
        check(made.execute(given), given)
    given = items(7)
    check(made.execute(given), given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(made.execute(given), given)
