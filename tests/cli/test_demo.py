"""`run_demo` on its small tower: what it prints, and that it notices a wrong op."""

import io
import re
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers")
pytest.importorskip("skimage")

import polyfuse
from polyfuse.cli._demo import load_photos, run_demo

GRIDS = [[1, 32, 32], [1, 24, 38], [1, 26, 40], [1, 18, 28]]


def demo() -> tuple[int, str]:
    text = io.StringIO()
    status = run_demo(True, Console(file=text, width=200), "cpu")
    return status, text.getvalue()


def test_photos_need_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the photos were downloaded"))
    pixels, grid = load_photos()
    assert grid.tolist() == GRIDS
    assert pixels.shape == (3480, 1536)
    assert pixels.dtype == torch.float32
    assert -1 <= pixels.min() < -0.9
    assert 0.9 < pixels.max() <= 1


def test_fast_demo() -> None:
    status, text = demo()
    assert status == 0
    for grid, patches in zip(GRIDS, (1024, 912, 1040, 504), strict=True):
        assert re.search(rf"\[{grid[0]},{grid[1]},{grid[2]}\]\W+{patches}\b", text)
    embeddings, tower = (re.search(rf"{name}(.*)", text) for name in ("position embeddings", "whole tower"))
    assert embeddings
    assert tower
    for row in (embeddings, tower):
        old, new = re.findall(r"([\d.,]+) ms", row[1])
        assert float(old.replace(",", "")) > 0
        assert float(new.replace(",", "")) > 0
    change = [float(row[1].split("│")[-2]) for row in (embeddings, tower)]
    assert 0 < change[0] < 2**-8
    assert 0 < change[1] < 2**-7
    assert "polyfuse: every element right" in text
    assert re.search(r"Transformers: \d+ of 222720 elements wrong", text)
    assert "pos_embed_interpolate on cpu (torch arrays): torch" in text
    assert "configs/platforms/cpu.yaml" in text


@pytest.mark.parametrize("where", ["everywhere", "in the tower"])
def test_wrong_op_is_noticed(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = polyfuse.pos_embed_interpolate

    def wrong(table: torch.Tensor, grid: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        result = op(table, grid, **kwargs)
        return result.roll(1, 0) if where == "everywhere" or "mode" in kwargs else result

    monkeypatch.setattr(polyfuse, "pos_embed_interpolate", wrong)
    status, text = demo()
    assert status == 1
    if where == "everywhere":
        assert re.search(r"polyfuse: \d+ of 222720 elements wrong", text)
    else:
        assert "The accelerated tower did not use the op's embeddings." in text
