"""Stacked weights, kept copies, and the choice of a strategy by the measured table."""

import gc

import pytest
import torch

from polyfuse import Unsupported
from polyfuse._torch import projections
from polyfuse._torch.projections import as_one_weight, choose, one_bias, one_weight, stack_weights

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
GEMMS = ("sequential", "parallel", "merged")


@pytest.fixture(params=DEVICES)
def operands(request: pytest.FixtureRequest) -> list[torch.Tensor]:
    """An activation [7, 64] and two weights [96, 64] and [8, 64]."""
    torch.manual_seed(0)
    return [torch.randn(s, device=request.param, dtype=torch.bfloat16) for s in ((7, 64), (96, 64), (8, 64))]


def test_stacked_weights_are_one_without_a_copy(operands: list[torch.Tensor]) -> None:
    _, w1, w2 = operands
    views = stack_weights(w1, w2)
    whole = as_one_weight(*views)
    assert whole is not None
    assert whole.data_ptr() == views[0].data_ptr()
    assert torch.equal(whole, torch.cat([w1, w2]))
    assert as_one_weight(w1, w2) is None
    assert as_one_weight(views[1], views[0]) is None
    before = len(projections._merged)
    assert one_weight(*views).data_ptr() == views[0].data_ptr()
    assert len(projections._merged) == before


def test_other_weights_are_concatenated_once_and_again_after_a_write(operands: list[torch.Tensor]) -> None:
    _, w1, w2 = operands
    before = dict(projections._merged)
    first = one_weight(w1, w2)
    assert torch.equal(first, torch.cat([w1, w2]))
    assert one_weight(w1, w2) is first
    assert len(projections._merged) == len(before) + 1
    w2.mul_(2)
    assert torch.equal(one_weight(w1, w2), torch.cat([w1, w2]))
    operands.clear()
    del w1, w2
    gc.collect()
    assert dict(projections._merged) == before


def test_a_missing_bias_is_zeros(operands: list[torch.Tensor]) -> None:
    x, w1, w2 = operands
    b1, b2 = x.new_ones(96), x.new_ones(8)
    both, first, second = (one_bias(*pair, (w1, w2)) for pair in ((b1, b2), (b1, None), (None, b2)))
    assert [t is None or t.tolist() for t in (both, first, second)] == [
        [1] * 104,
        [1] * 96 + [0] * 8,
        [0] * 96 + [1] * 8,
    ]
    assert one_bias(None, None, (w1, w2)) is None


def test_no_copy_is_made_inside_a_capture(operands: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    _, w1, w2 = operands
    monkeypatch.setattr(projections, "_capturing", lambda device: True)
    with pytest.raises(Unsupported, match="stack_weights, or one call before the capture"):
        one_weight(w1, w2)
    assert one_weight(*stack_weights(w1, w2)).shape == (104, 64)


def test_without_a_measurement_the_choice_is_sequential(operands: list[torch.Tensor]) -> None:
    x, w1, w2 = operands
    assert choose(x, w1, w2, GEMMS) == "sequential"


def test_the_choice_follows_the_table(operands: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x, w1, w2 = operands
    ranges = ((4, ("fused", "merged", "parallel")), (None, ("merged", "parallel", "sequential")))
    monkeypatch.setattr(projections, "_table", lambda device: {(64, 96, 8, "bfloat16"): ranges})
    every = (*GEMMS, "fused")
    assert choose(x, w1, w2, every) == "sequential"
    monkeypatch.setattr(projections, "_capturing", lambda device: True)
    assert choose(x[:4], w1, w2, every) == "fused"
    assert choose(x[:4], w1, w2, GEMMS) == "parallel"
    assert choose(x, *stack_weights(w1, w2), every) == "merged"
    assert choose(x, w1, w2, every) == "parallel"
    monkeypatch.setattr(projections, "streams_enabled", lambda: False)
    assert choose(x, w1, w2, every) == "sequential"
