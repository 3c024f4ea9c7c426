"""What `report` and `strict` say of compiled graphs, also of those from a compile cache."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.functional import silu

from polyfuse.runtime import fusion
from polyfuse.spec import SpecError
from polyfuse.unfused import block_quant, silu_mul
from tests.runtime.fusion.graphs import E4M3, activated, quantise, rows, with_ratio, with_scale

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own


def test_a_graph_with_gradients_is_left_alone() -> None:
    compiled = torch.compile(lambda x: quantise(activated(x))[1].sum())
    before = len(fusion.report())
    x = rows(4, dtype=torch.float32).requires_grad_()
    with fusion.enable(), torch.enable_grad():
        compiled(x).backward()
    assert x.grad is not None
    assert [(len(graph.matches), len(graph.left)) for graph in fusion.report()[before:]] == [(0, 1), (0, 1)]


def two_activations(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return *block_quant(silu_mul(x)), *block_quant(silu_mul(y), group_size=32)


def test_the_report_survives_the_compile_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two graphs, neither with a kernel of Inductor's own, which would take seconds."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hits, reports = [], []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        with fusion.enable():
            for function in (two_activations, torch.mm):
                torch.compile(function)(torch.ones(256, 256), torch.zeros(256, 256))
        hits.append(counters["aot_autograd"]["autograd_cache_hit"])
        reports.append(fusion.report())
    assert hits == [0, 2]
    cold, warm = reports
    assert cold == warm
    assert [match["shape"] for match in warm[0].matches] == [["256", "256"]] * 2
    assert warm[1:] == [fusion.GraphReport(matches=(), left=())]


def test_a_match_of_less_says_what_kept_it_from_more() -> None:
    before = len(fusion.report())
    with fusion.enable(strict=True):
        torch.compile(lambda x: quantise(silu(x.chunk(2, -1)[0].clamp(max=7.0)) * x.chunk(2, -1)[1]))(rows(4))
    (graph,) = fusion.report()[before:]
    assert [match["op"] for match in graph.matches] == ["block_quant"]
    assert graph.left == ("silu_mul_block_quant: up is not clamped, and the gate clamped to at most 7.0",)


def test_strict_may_name_the_op_that_a_graph_must_have() -> None:
    x = rows(4)
    text = (
        r"^fusion\.enable: strict: expected silu_mul_block_quant in each graph, got block_quant "
        r"\(silu_mul_block_quant: up is not clamped, and the gate clamped to at most 7\.0\)"
    )
    with fusion.enable(strict="silu_mul_block_quant"):
        with pytest.raises(fusion.NoMatch, match=text):
            torch.compile(lambda x: quantise(silu(x.chunk(2, -1)[0].clamp(max=7.0)) * x.chunk(2, -1)[1]))(x)
        torch.compile(lambda x: (*quantise(activated(x)), *quantise(x)))(x)
    assert {match["op"] for match in fusion.report()[-1].matches} == {"silu_mul_block_quant", "block_quant"}


def test_strict_raises_for_each_graph_with_no_match_and_says_what_was_left() -> None:
    x = rows(4)
    text = r"^fusion\.enable: strict: expected something to fuse in each graph, got none"
    with fusion.enable(strict=True):
        with pytest.raises(fusion.NoMatch, match=text + r"\n"):
            torch.compile(lambda x: x + 1)(x)
        with pytest.raises(SpecError, match=text + r" \(y \* \(1 / scale\) is not y / scale\)"):
            torch.compile(with_ratio(lambda y, scale: (y * (1.0 / scale)).to(E4M3)))(x)
        with pytest.raises(SpecError, match=text + r" \(the scale is rounded to .*; what becomes float8_e4m3fn"):
            torch.compile(lambda x: (with_scale(lambda _, scale: scale.bfloat16().float())(x), x.to(E4M3)))(x)
        with torch.enable_grad(), pytest.raises(SpecError, match=text + r" \(the graph computes gradients"):
            torch.compile(lambda x: x * 2)(x.float().requires_grad_())
    assert torch.equal(torch.compile(lambda x: x + 1)(x), x + 1)
