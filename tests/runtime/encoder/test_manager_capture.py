"""What `EncoderGraphManager` captures, drops, measures and counts, and the settings that it refuses."""

import json
import logging
import re
from collections import Counter
from typing import Any

import pytest
import torch

from polyfuse import SpecError
from polyfuse.runtime.encoder.capture import EagerReplay
from polyfuse.runtime.encoder.manager import EncoderGraphManager
from polyfuse.runtime.encoder.protocol import Capacity, ItemSize
from tests.runtime.encoder.doubler import Doubler, check, items, manager


def test_a_budget_that_cannot_be_captured_is_dropped_with_one_warning() -> None:
    made, given = manager([8, 16, 32], Doubler(fail_at=(16,))), items(12)
    with pytest.warns(RuntimeWarning, match="no graph for the budget of 16 tokens: OutOfMemoryError: no room") as seen:
        check(made.execute(given), given)
    assert len(seen) == 1
    check(made.execute(given), given)
    assert (made.stats.capture_failures, made.stats.replays, set(made.stats.costs)) == (1, Counter({32: 2}), {8, 32})


def test_nothing_can_be_captured() -> None:
    class Broken(EagerReplay):
        def capture(self, step: Any) -> Any:
            raise RuntimeError("not here")

    made, given = EncoderGraphManager(Doubler(), runtime=Broken(torch.device("cpu")), budgets=[8, 16]), items(5, 9)
    with pytest.warns(RuntimeWarning, match="RuntimeError: not here"):
        check(made.execute(given), given)
    assert (made.stats.capture_failures, made.stats.eager_items) == (2, 2)


class Pool(EagerReplay):
    """Pretends that a pool takes as many bytes as the largest captured step's call had tokens."""

    def __init__(self, encoder: Doubler) -> None:
        super().__init__(torch.device("cpu"))
        self.encoder, self.size = encoder, 0

    def capture(self, step: Any) -> Any:
        replay = super().capture(step)
        self.size = max(self.size, self.encoder.calls[-1].tokens)
        return replay

    def pool_bytes(self) -> int:
        return self.size

    def reset(self) -> None:
        self.size = 0


def test_memory_bound_drops_the_largest_budgets() -> None:
    encoder = Doubler()
    made = EncoderGraphManager(encoder, runtime=Pool(encoder), budgets=[8, 16, 32], memory_bytes=20)
    with pytest.warns(RuntimeWarning, match="budget of 32 tokens: the pool takes 32 bytes with it, memory_bytes is 20"):
        made.capture()
    assert (set(made.stats.costs), made.stats.pool_bytes) == ({8, 16}, 16)


def test_largest_budget_is_captured_first() -> None:
    encoder = Doubler()
    EncoderGraphManager(encoder, budgets=[8, 32, 16]).capture()
    captured = list(dict.fromkeys(c.tokens for c in encoder.calls))
    assert captured == [32, 16, 8]


def test_lazy_capture() -> None:
    made = manager([8, 16, 32], capture="lazy")
    made.capture()
    assert set(made.stats.costs) == {32}
    given = items(6)
    check(made.execute(given), given)
    assert set(made.stats.costs) == {8, 32}
    assert made.stats.replays == Counter({8: 1})


def test_clear() -> None:
    made, given = manager([16]), items(5)
    made.execute(given)
    made.clear()
    stats = made.stats
    assert (stats.requests, stats.buffer_bytes, stats.costs) == (0, 0, {})
    check(made.execute(given), given)
    assert made.stats.requests == 1


def test_stats_are_a_copy_and_serialise() -> None:
    made = manager([16])
    made.execute(items(12))
    stats = made.stats
    stats.replays[16] += 5
    assert made.stats.replays == Counter({16: 1})
    assert made.stats.waste == 4 / 16
    assert json.loads(json.dumps(made.stats.as_dict())) | {"waste": 0.25, "replays": {"16": 1}} == json.loads(
        json.dumps(made.stats.as_dict())
    )
    assert made.stats.buffer_bytes == 32 * 12 + 16 * 16 + 32 * 12 + 16 * 24 + 16 * 12
    assert made.stats.capture_seconds > 0


def test_stats_are_logged_though_the_count_jumps(caplog: pytest.LogCaptureFixture) -> None:
    made = manager([4], log_every=2)
    with caplog.at_level(logging.INFO, logger="polyfuse"):
        for _ in range(4):
            made.execute(items(4, 4, 4))
    assert len(caplog.records) == 4
    assert "'requests': 1" in caplog.records[0].getMessage()


def test_predict_is_the_planners_cost() -> None:
    made = manager([16, 64])
    assert made.predict([ItemSize(5)]) == 26.0
    assert made.predict([ItemSize(16), ItemSize(16)]) == 52.0


def test_budgets_are_multiples_of_an_items_tokens() -> None:
    encoder = Doubler()
    encoder.token_multiple = 6
    with pytest.raises(
        SpecError, match=re.escape("Doubler: budgets: expected multiples of 6, its items' tokens, got [8]")
    ):
        EncoderGraphManager(encoder, budgets=[6, 8])
    automatic = EncoderGraphManager(encoder, smallest=6, largest=60)._capacities
    assert max(automatic) == 60
    assert all(tokens % 6 == 0 for tokens in automatic)


def test_wrong_output_shape_is_not_broadcast() -> None:
    class Short(Doubler):
        def forward(self, inputs: Any, capacity: Capacity) -> dict[str, torch.Tensor]:
            outputs = super().forward(inputs, capacity)
            return outputs | {"rows": outputs["rows"][:1]}

    with pytest.warns(RuntimeWarning, match=re.escape("rows: expected an output [32, 3], got [1, 3]")):
        EncoderGraphManager(Short(), budgets=[16]).capture()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": [3]}, "encoder: budget: unknown key; did you mean budgets?"),
        ({"budgets": [0]}, "encoder: budgets.0: expected a number >= 1, got 0"),
        ({"policy": "best"}, "encoder: policy: expected one of 'optimal' or 'greedy', got 'best'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        EncoderGraphManager(Doubler(), **settings)
