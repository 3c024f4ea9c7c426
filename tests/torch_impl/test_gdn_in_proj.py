"""`gdn_in_proj` in PyTorch: strategies against the oracle and against one another."""

import re

import pytest
import torch

import polyfuse
from polyfuse import SpecError
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


def test_merged_results_are_views_of_one_buffer(operands):
    x, w1, w2 = operands
    for weights in ((w1, w2), stack_weights(w1, w2)):
        large, small = polyfuse.gdn_in_proj(x, *weights, strategy="merged", backend="torch")
        assert large.stride() == small.stride() == (104, 1)
        assert small.data_ptr() == large.data_ptr() + 96 * x.element_size()
        assert torch.allclose(large.float(), x.float() @ w1.float().T, atol=0.2)
        assert torch.allclose(small.float(), x.float() @ w2.float().T, atol=0.2)


def test_merged_follows_a_write_to_a_weight(operands):
    x, w1, w2 = operands
    first = polyfuse.gdn_in_proj(x, w1, w2, strategy="merged", backend="torch")[1]
    w2.mul_(2)
    assert torch.equal(polyfuse.gdn_in_proj(x, w1, w2, strategy="merged", backend="torch")[1], first * 2)


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
    with pytest.raises(SpecError, match=re.escape(message)):
        polyfuse.gdn_in_proj(*(torch.zeros(s) for s in shapes))
