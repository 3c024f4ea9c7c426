"""Encoders whose results for an item depend on the whole batch: found before the first capture, and given no graphs."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from polyfuse.runtime.encoder.protocol import Capacity
from tests.runtime.encoder.doubler import WIDTH, Doubler, items, manager

Leak = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def scaled_by_all(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Quantised with one scale for the whole activation."""
    scale = rows.abs().amax() / 127
    return values * (rows / scale).round().mul(scale).mean()


def centred(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Normalised by the statistics of the batch."""
    return values - rows.mean()


def poisoned(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Multiplied by zero what belongs to no item: only NaN and infinity come through."""
    return values + 0 * rows.sum()


class Leaking(Doubler):
    """A Doubler with one output into which every row of the buffer goes."""

    def __init__(self, leak: Leak) -> None:
        super().__init__()
        self.leak = leak

    def forward(self, inputs: Mapping[str, torch.Tensor], capacity: Capacity) -> dict[str, torch.Tensor]:
        outputs = super().forward(inputs, capacity)
        return outputs | {"rows": self.leak(inputs["rows"], outputs["rows"])}


@pytest.mark.parametrize("leak", [scaled_by_all, centred, poisoned])
def test_no_graph_holds_an_encoder_that_reads_its_padding(leak: Leak) -> None:
    runs = manager([8, 4], Leaking(leak))
    given = items(3, 2)
    with pytest.warns(RuntimeWarning, match="rows of an item depends on the padding beside it") as warned:
        result = runs.execute(given)
    assert len(warned) == 2
    rows = torch.cat(given)
    assert torch.equal(result["rows"], leak(rows, 2 * rows))
    assert (runs.stats.replays.total(), runs.stats.eager_items, runs.stats.capture_failures) == (0, 2, 2)


def test_a_later_request_is_not_changed_by_an_earlier_one() -> None:
    runs = manager([8])
    before = runs.execute(items(3))
    runs.execute([torch.full((16, WIDTH), float("inf"))])
    after = runs.execute(items(3))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_budget_of_one_item_has_no_padding_to_try() -> None:
    encoder: Any = Doubler()
    encoder.token_multiple = 4
    runs = manager([4], encoder)
    runs.capture()
    assert [call.tokens for call in encoder.calls].count(4) == len(encoder.calls)
    assert runs.stats.capture_failures == 0
