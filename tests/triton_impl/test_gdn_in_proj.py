"""The Triton backend of `gdn_in_proj`: every strategy against the oracle, and `fused` as one launch."""

from typing import Any

import pytest
import torch

import polyfuse
from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import registry
from polyfuse.triton_impl import gdn_in_proj as module
from polyfuse.triton_impl._common import INTERPRETED

OP = "gdn_in_proj"
DEVICE = "cpu" if INTERPRETED.value else "cuda"
CASES = [
    *(case for case in cases(OP) if case.repeat == 1),
    Case("over_64_rows", {"...": (70,), "hidden": 40, "N1": 50, "N2": 3}, {"strategy": "fused"}, {"T": "bfloat16"}),
    Case("long_hidden", {"...": (2,), "hidden": 1000, "N1": 33, "N2": 33}, {"strategy": "fused"}, {"T": "float16"}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case: Case) -> None:
    assert Trial(OP, case, 0).on(registry().get("triton"), DEVICE) == ("passed", "")


def operands(rows: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s, dtype=torch.bfloat16, device=DEVICE) for s in ((rows, 64), (96, 64), (8, 64))]


def test_fused_is_one_launch_that_writes_every_element(launches: list[Any], poisoned_memory: None) -> None:
    x, w1, w2 = operands(5)
    large, small = module.fused(x, w1, w2, None, None)
    assert len(launches) == 1
    assert torch.allclose(large.float(), x.float() @ w1.float().T, atol=0.2)
    assert torch.allclose(small.float(), x.float() @ w2.float().T, atol=0.2)


def test_nothing_to_compute_is_no_launch(launches: list[Any]) -> None:
    x, w1, w2 = operands(0)
    assert [r.shape for r in module.fused(x, w1, w2, None, None)] == [(0, 96), (0, 8)]
    x = operands(3)[0]
    assert [r.shape for r in module.fused(x, w1[:0], w2[:0], None, None)] == [(3, 0), (3, 0)]
    assert launches == []


def test_auto_without_a_measurement_launches_no_kernel(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyfuse._torch.projections._table", lambda device: {})
    x, w1, w2 = operands(5)
    auto = polyfuse.gdn_in_proj(x, w1, w2, backend="triton")
    assert launches == []
    assert all(map(torch.equal, auto, polyfuse.gdn_in_proj(x, w1, w2, strategy="sequential", backend="triton")))
