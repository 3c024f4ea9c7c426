"""`gdn_in_proj` in PyTorch: strategies against the oracle and against one another."""

import gc

import pytest
import torch

import polyfuse
from polyfuse import SpecError, Unsupported
from polyfuse._torch import projections as _projections
from polyfuse.conformance import Trial, cases
from polyfuse.dispatch import registry
from polyfuse.runtime import stack_weights

OP = "gdn_in_proj"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def operands(request):
    torch.manual_seed(0)
    return [torch.randn(s, device=request.param, dtype=torch.bfloat16) for s in ((7, 64), (96, 64), (8, 64))]


@pytest.mark.parametrize("case", [c for c in cases(OP) if c.repeat == 1], ids=lambda c: c.name)
def test_case(case):
    status, detail = Trial(OP, case, 0).on(registry().get("torch"))
    assert (status, detail) == ("passed", "") or (status == "skipped" and "strategy='fused'" in detail)


def test_parallel_is_sequential_bit_for_bit(operands):
    one = polyfuse.gdn_in_proj(*operands, strategy="sequential", backend="torch")
    two = polyfuse.gdn_in_proj(*operands, strategy="parallel", backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_adjacent_weights_are_merged_without_a_copy(operands):
    x, w1, w2 = operands
    views = stack_weights(w1, w2)
    merged = _projections.as_one_weight(*views)
    assert merged is not None
    assert merged.data_ptr() == views[0].data_ptr()
    assert torch.equal(merged, torch.cat([w1, w2]))
    assert _projections.as_one_weight(w1, w2) is None
    assert _projections.as_one_weight(views[1], views[0]) is None
    before = len(_projections._merged)
    out = polyfuse.gdn_in_proj(x, *views, strategy="merged", backend="torch")
    assert len(_projections._merged) == before
    assert out[0].stride() == (104, 1)


def test_other_weights_are_concatenated_once_and_again_after_a_write(operands):
    x, w1, w2 = operands
    before = dict(_projections._merged)
    first = polyfuse.gdn_in_proj(x, w1, w2, strategy="merged", backend="torch")[1].clone()
    polyfuse.gdn_in_proj(x, w1, w2, strategy="merged", backend="torch")
    assert len(_projections._merged) == len(before) + 1
    w2.mul_(2)
    second = polyfuse.gdn_in_proj(x, w1, w2, strategy="merged", backend="torch")[1]
    assert torch.equal(second, first * 2)
    operands.clear()
    del w1, w2
    gc.collect()
    assert dict(_projections._merged) == before


def test_no_copy_is_made_inside_a_capture(operands, monkeypatch):
    x, w1, w2 = operands
    monkeypatch.setattr(_projections, "_capturing", lambda device: True)
    with pytest.raises(Unsupported, match="stack_weights, or one call before the capture"):
        polyfuse.gdn_in_proj(x, w1, w2, strategy="merged", backend="torch")
    out = polyfuse.gdn_in_proj(x, *stack_weights(w1, w2), strategy="merged", backend="torch")
    assert out[1].shape == (7, 8)


def test_auto_without_a_measurement_is_sequential(operands):
    x, w1, w2 = operands
    assert _projections.choose(x, w1, w2, ("sequential", "parallel", "merged")) == "sequential"


def test_auto_follows_the_table(operands, monkeypatch):
    x, w1, w2 = operands
    ranges = ((4, ("fused", "merged", "parallel")), (None, ("merged", "parallel", "sequential")))
    monkeypatch.setattr(_projections, "_table", lambda device: {(64, 96, 8, "bfloat16"): ranges})
    every = ("sequential", "parallel", "merged", "fused")
    assert _projections.choose(x, w1, w2, every) == "sequential"
    monkeypatch.setattr(_projections, "_capturing", lambda device: True)
    assert _projections.choose(x[:4], w1, w2, every) == "fused"
    assert _projections.choose(x[:4], w1, w2, every[:3]) == "parallel"
    assert _projections.choose(x, *stack_weights(w1, w2), every) == "merged"
    assert _projections.choose(x, w1, w2, every) == "parallel"
    monkeypatch.setattr(_projections, "streams_enabled", lambda: False)
    assert _projections.choose(x, w1, w2, every) == "sequential"


def test_gradients_reach_both_weights():
    x, w1, w2 = (torch.randn(s, requires_grad=True) for s in ((3, 8), (5, 8), (2, 8)))
    sum(r.sum() for r in polyfuse.gdn_in_proj(x, w1, w2)).backward()
    assert torch.allclose(w1.grad, x.detach().sum(0).expand(5, 8), atol=1e-5)
    assert torch.allclose(x.grad, (w1.detach().sum(0) + w2.detach().sum(0)).expand(3, 8), atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((7, 64), (96, 32), (8, 64)), "w_qkvz: expected hidden=64 in [N1, hidden], got [96, 32]"),
        (((64,), (96, 64), (8, 64)), "x: expected at least 2 dimensions, got 1"),
    ],
)
def test_bad_shapes(shapes, message):
    import re

    with pytest.raises(SpecError, match=re.escape(message)):
        polyfuse.gdn_in_proj(*(torch.zeros(s) for s in shapes))
