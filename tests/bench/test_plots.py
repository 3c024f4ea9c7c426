"""`polyfuse bench plot`: a figure for each kind of results, small, and saying what it shows."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import polyfuse
from polyfuse.cli import main

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
HEADER = {"device": "cuda (NVIDIA H200)", "model": "qwen3_5", "sizes": "Qwen3.5-9B", "dtype": "bfloat16", "layers": 4}
LAYER = {"batch": 1, "tokens": 8, "us": 9.0, "parts": {"delta rule": 5.0, "gated norm": 4.5, "rest": -0.5}}
ROW = {"batch": 16, "context": 2048, "tokens": 16, "mode": "graph", "ms": 2.0, "tokens_per_s": 8000.0}
MODEL = HEADER | {
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
    "strategies": [
        {"rows": rows, "captured": captured, "chosen": "merged", "us": {"sequential": 2.0, "merged": 1.0}}
        for captured in (False, True)
        for rows in (1, 16)
    ],
    "conv": [
        {"tokens": 8, "variant": "one pass", "us": 3.0, "ratio": 1.0},
        {"tokens": 8, "variant": "separate", "us": 9.0, "ratio": 3.0},
    ],
    "layer": [
        LAYER | {"phase": phase, "variant": variant}
        for phase in ("prefill", "decode")
        for variant in ("untouched + fla", "accelerated")
    ],
    "rows": [
        ROW | {"phase": phase, "variant": variant}
        for phase in ("prefill", "decode")
        for variant in ("untouched", "untouched + fla", "accelerated")
    ],
}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model_qwen3_5_h200.json"
    path.write_text(json.dumps(MODEL))
    return path


def invoke(*args):
    return CliRunner().invoke(main, ["bench", "plot", *map(str, args)])


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        (
            "h200",
            ["Ops on cuda (NVIDIA H200) (torch 2.11.0, triton 3.6.0)", "gdn_post_conv", "device time per call (µs)"],
        ),
        (
            "encoder_h200",
            ["qwen3_vl, 27 layers, bfloat16", "500 requests, 4333 items", "latency (ms)", "rows of pixels"],
        ),
        ("encoder_2x_h200", ["2 ranks", "50 requests, 1000 items"]),
        ("model_qwen3_5_h200", ["Qwen3.5-9B, 4 layers, bfloat16 on", "Prefill, whole model", "time (ms)"]),
    ],
)
def test_committed_results(name, texts, tmp_path):
    pytest.importorskip("matplotlib")
    result = invoke(RESULTS / f"{name}.json", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    figure = (tmp_path / f"{name}.svg").read_text()
    assert len(figure) < 150_000
    for text in texts:
        assert text in figure


def test_model(model, tmp_path):
    pytest.importorskip("matplotlib")
    result = invoke(model, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    figure = (tmp_path / "model_qwen3_5_h200.svg").read_text()
    titles = [
        "Prefill, whole model",
        "Decode after 2048 tokens",
        "One layer, prefill of 8 tokens",
        "From projection to delta rule",
        "in_proj, eager",
        "in_proj, captured",
    ]
    for text in (
        *titles,
        "Qwen3.5-9B, 4 layers, bfloat16 on",
        "time (ms)",
        "device time (µs)",
        "untouched + fla",
        "gated norm",
    ):
        assert text in figure


def test_a_panel_of_dots():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from polyfuse.bench.plots.figure import dots

    axis = Figure().subplots()
    dots(axis, ["a", "b"], {"before": [1.0, None], "after": [0.5, 20.0]}, "Title", "ms")
    assert axis.get_xscale() == "log"
    assert not axis.patches  # no bars
    shown = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axis.lines}
    assert shown == {"before": [(1.0, 0)], "after": [(0.5, 0), (20.0, 1)]}
    assert axis.get_ylim() == (1.5, -0.5)


def test_the_layer_is_that_of_the_largest_call():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from polyfuse.bench.plots.model import model_panels

    larger = LAYER | {"phase": "prefill", "tokens": 64, "us": 90.0, "variant": "untouched"}
    rows = [larger | {"tokens": 8, "us": 9.0}, larger, larger | {"variant": "accelerated", "us": 30.0}]
    (draw,) = model_panels(EMPTY | {"layer": rows}).draws
    axis = Figure().subplots()
    draw(axis)
    assert axis.get_title() == "One layer, prefill of 64 tokens"
    # The whole, and the parts that take time: `rest` is less than nothing.
    assert [list(line.get_xdata()) for line in axis.lines] == [[90.0, 5.0, 4.5], [30.0, 5.0, 4.5]]


def test_same_results_give_the_same_file(tmp_path):
    pytest.importorskip("matplotlib")
    for folder in ("a", "b"):
        assert invoke(RESULTS / "encoder_2x_h200.json", "--out", tmp_path / folder).exit_code == 0
    assert len({(tmp_path / folder / "encoder_2x_h200.svg").read_bytes() for folder in ("a", "b")}) == 1


def test_png(tmp_path):
    pytest.importorskip("matplotlib")
    assert invoke(RESULTS / "encoder_2x_h200.json", "--out", tmp_path, "--format", "png").exit_code == 0
    assert (tmp_path / "encoder_2x_h200.png").read_bytes().startswith(b"\x89PNG")


EMPTY = MODEL | {key: [] for key in ("strategies", "conv", "layer", "rows")}


@pytest.mark.parametrize("content", [{"device": "cpu"}, [1], EMPTY], ids=["other", "list", "empty"])
def test_other_files_are_refused(content, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "soak.json"
    path.write_text(json.dumps(content))
    result = invoke(path, "--out", tmp_path)
    assert result.exit_code == 2
    expected = "plot: path: expected results of polyfuse bench, bench encoder or bench model, got soak.json"
    assert expected in " ".join(result.output.split())


def test_a_file_that_is_not_json(tmp_path):
    pytest.importorskip("matplotlib")
    from polyfuse.bench.plots import plot

    path = tmp_path / "notes.txt"
    path.write_text("a note")
    with pytest.raises(polyfuse.SpecError, match=r"^plot: path: expected a JSON file, got notes.txt \(Expecting value"):
        plot(path, tmp_path)


def test_without_matplotlib(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke(model, "--out", tmp_path)
    assert result.exit_code == 2
    assert "matplotlib is not installed: pip install 'polyfuse[plots]'" in " ".join(result.output.split())
