"""The parts of the demo, with its small tower: what they print, and that they notice a wrong op."""

import io
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers")
pytest.importorskip("skimage")

import polyfuse
from polyfuse.cli import _demo
from polyfuse.cli._demo import LARGE, conclude, load_photos, run_cases, run_text_model, run_tower
from polyfuse.dispatch import registry
from polyfuse.spec import OPS

GRIDS = [[1, 32, 32], [1, 24, 38], [1, 26, 40], [1, 18, 28]]
SMALL_GRIDS = [[1, 10, 10], [1, 8, 12], [1, 8, 12], [1, 8, 12]]  # of a CPU


def printed(run: Any, *args: Any) -> tuple[Any, str]:
    text = io.StringIO()
    return run(*args, Console(file=text, width=200), "cpu"), text.getvalue()


def test_photos_need_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the photos were downloaded"))
    pixels, grid = load_photos(LARGE)
    assert grid.tolist() == GRIDS
    assert pixels.shape == (3480, 1536)
    assert pixels.dtype == torch.float32
    assert -1 <= pixels.min() < -0.9
    assert 0.9 < pixels.max() <= 1


def test_the_tower() -> None:
    problems, text = printed(run_tower, True)
    assert problems == []
    for grid, patches in zip(SMALL_GRIDS, (100, 96, 96, 96), strict=True):
        assert re.search(rf"\[{grid[0]},{grid[1]},{grid[2]}\]\W+{patches}\b", text)
    embeddings, tower = (re.search(rf"{name}(.*)", text) for name in ("position embeddings", "whole tower"))
    assert embeddings
    assert tower
    assert " ms" not in text  # on a CPU the time says nothing
    change = [float(row[1].split("│")[-2]) for row in (embeddings, tower)]
    assert 0 < change[0] < 2**-18
    assert 0 < change[1] < 2**-18
    assert "polyfuse: every element right" in text
    assert re.search(r"Transformers: \d+ of 24832 elements wrong", text)
    assert "pos_embed_interpolate on cpu (torch arrays): torch" in text
    assert "configs/platforms/cpu.yaml" in text


@pytest.mark.parametrize("where", ["everywhere", "in the tower"])
def test_wrong_op_is_noticed(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = polyfuse.pos_embed_interpolate

    def wrong(table: torch.Tensor, grid: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        result = op(table, grid, **kwargs)
        return result.roll(1, 0) if where == "everywhere" or "mode" in kwargs else result

    monkeypatch.setattr(polyfuse, "pos_embed_interpolate", wrong)
    problems, text = printed(run_tower, True)
    if where == "everywhere":
        assert [problem.partition(":")[0] for problem in problems] == ["position embeddings"]
        assert re.search(r"polyfuse: \d+ of 24832 elements wrong", text)
    else:
        assert problems == ["The accelerated tower did not use the op's embeddings."]


def test_the_text_model_generates_the_same_tokens() -> None:
    problems, text = printed(run_text_model)
    assert problems == []
    assert "16 tokens of a greedy generation: the same" in text
    (change,) = re.findall(r"max \|change\| ([\d.e-]+)", text)
    assert 0 < float(change) < 1e-5
    assert "3 gated_delta_rule, 3 gated_rms_norm, 3 gdn_conv_prep, 45 gdn_decode, 48 gdn_in_proj" in text


def test_other_tokens_and_a_model_without_ops_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    op = polyfuse.gated_rms_norm
    monkeypatch.setattr(polyfuse, "gated_rms_norm", lambda *args, **options: -op(*args, **options))
    problems, text = printed(run_text_model)
    assert problems == ["The accelerated text model generates other tokens."]
    assert "16 tokens of a greedy generation: OTHERS" in text
    monkeypatch.setattr(_demo, "accelerate", lambda model: model)
    assert printed(run_text_model)[0] == ["The accelerated text model calls no op."]


def test_the_cases_and_what_they_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_demo, "OPS", {name: OPS[name] for name in ("gated_rms_norm", "block_quant")})
    few = [backend for backend in registry().usable() if backend.name in ("numpy", "pallas")]
    monkeypatch.setattr(type(registry()), "usable", lambda self: few)
    (found, problems), text = printed(run_cases)
    assert problems == []
    ran = {(r.op, r.backend, r.case) for r in found if r.status == "passed"}
    assert ran == {
        *((op, "numpy", case) for op in ("gated_rms_norm", "block_quant") for case in OPS[op].core[:2]),
        *(("gated_rms_norm", "pallas", case) for case in OPS["gated_rms_norm"].core[:2]),
    }
    assert {(r.op, r.backend) for r in found if r.status == "skipped"} == {("block_quant", "pallas")}
    assert re.search(r"block_quant\W+2 of 2\W+-", text)

    status, text = printed(lambda *to: conclude(*to, found, []))
    assert status == 0
    assert "6 results of 2 ops on 2 backends lie within the oracle's intervals" in text
    shown, not_shown = text.split("Not shown")
    assert "conformant" not in shown
    assert "polyfuse conformance --report report" in not_shown
    assert "Speed: on a CPU" in not_shown

    wrong = [replace(found[0], status="failed", detail="too large")]
    status, text = printed(lambda *to: conclude(*to, wrong, [f"{wrong[0].op}: too large"]))
    assert status == 1
    assert f"wrong {wrong[0].op}: too large" in text
    assert "Shown, but for what is wrong above" in text
    assert "the same 16 tokens" not in text
