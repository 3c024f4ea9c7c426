"""`polyfuse bench plot`: a figure for each kind of results, small, and saying what it shows."""

import json
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import polyfuse
from polyfuse.bench.measured import short
from polyfuse.bench.plots import charts_of
from polyfuse.bench.plots.chart import Chart, Row, Section, Series
from polyfuse.bench.plots.figure import COLUMN, DARK, GAP, GRID, MARGIN, PAPER, WIDTH, Scale, make_figure
from polyfuse.bench.plots.labels import case_label, model_label
from polyfuse.bench.plots.limit import LIMIT, limit_chart
from polyfuse.bench.plots.limit import RESULTS as FILES
from polyfuse.bench.plots.model import model_charts
from polyfuse.bench.plots.ops import op_charts
from polyfuse.cli import main

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
BENCHED = ("silu_mul_block_quant", "gdn_post_conv", "gdn_in_proj", "pos_embed_interpolate")
PLOTS = Path(__file__).parents[2] / "benchmarks/plots"
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
    ("name", "figures"),
    [
        ("h200", {f"h200_{op}" for op in BENCHED}),
        ("gdn_conv_prep_h200", {"gdn_conv_prep_h200"}),
        ("encoder_h200", {"encoder_h200"}),
        ("model_qwen3_5_h200", {"model_qwen3_5_h200_whole"}),
    ],
)
def test_committed_results(name, figures, tmp_path):
    pytest.importorskip("matplotlib")
    result = invoke(RESULTS / f"{name}.json", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert {path.stem for path in tmp_path.iterdir()} == figures


def test_a_committed_figure_writes_every_value_of_its_results():
    drawn = set()
    for path in sorted(RESULTS.glob("*.json")):
        data = json.loads(path.read_text())
        for chart in charts_of(data):
            figure = (PLOTS / f"{chart.name(path.stem)}.svg").read_text(encoding="utf-8")
            assert shown(chart) <= words(figure), chart.title
            assert "NVIDIA H200, bfloat16, PyTorch 2.11.0" in figure
            drawn.add(chart.name(path.stem))
    limit = limit_chart([json.loads((RESULTS / f"{name}.json").read_text()) for name in FILES])
    assert shown(limit) <= words((PLOTS / f"{LIMIT}.svg").read_text(encoding="utf-8"))
    assert {path.stem for path in PLOTS.iterdir()} == drawn | {LIMIT}, "run: make docs"


def shown(chart):
    """All that a chart has to say: its labels and its values."""
    rows = [row for section in chart.sections for row in section.rows]
    values = {short(value) for row in rows for value in row.values if value is not None}
    return values | {row.label for row in rows}


def words(figure):
    return {text.removeprefix("★ ") for text in re.findall(r">([^<>]+)</text>", figure)}


@pytest.mark.parametrize("figure", sorted(PLOTS.glob("*.svg")), ids=lambda path: path.stem)
def test_a_committed_figure_is_of_dots_and_for_light_and_dark(figure):
    text = figure.read_text(encoding="utf-8")
    assert len(text) < 80_000
    colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text.partition("</style>")[2]))
    assert colours <= set(DARK)
    for colour in colours:
        assert f'[style*="fill: {colour}"] {{ fill: {DARK[colour]} !important }}' in text
    ((width,),) = [re.findall(r'viewBox="0 0 ([\d.]+) ', text)]
    assert (
        float(width) <= 440.1
    )  # so that its smallest text, of 8.5 points, is 7 pixels high where a phone has 360 for it
    assert min(map(float, re.findall(r"font-size: ([\d.]+)px", text))) >= 8.5


def test_colours_stand_out_from_the_paper():
    for light, dark in DARK.items():
        if light not in (GRID, PAPER):
            assert contrast(light, PAPER) > 4.5, light
            assert contrast(dark, DARK[PAPER]) > 4.5, dark


def contrast(ink, paper):
    """The ratio of two colours' luminances, as WCAG 2 defines it."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(ink), luminance(paper)))
    return (high + 0.05) / (low + 0.05)


def test_model(model, tmp_path):
    pytest.importorskip("matplotlib")
    result = invoke(model, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    titles = {path.stem.removeprefix("model_qwen3_5_h200_"): path.read_text() for path in tmp_path.glob("*.svg")}
    assert set(titles) == {"whole", "layer", "conv", "in_proj"}
    assert all("Qwen3.5-9B, 4 layers" in figure for figure in titles.values())
    assert {"16 tokens", "16 sequences, graph", "2.00"} <= words(titles["whole"])
    assert {"Prefill of 8 tokens", "Decode of 1 sequence", "gated norm"} <= words(titles["layer"])
    assert "★ 1.00" in titles["in_proj"]


def test_a_chart_of_ops_has_the_limit_and_the_peers():
    row = {"op": "gdn_post_conv", "model": "qwen3_next_80b", "case": "L2048", "gigabytes_per_s": 3000.0}
    row |= {"eager_ratio": 9.0, "compile_ratio": None}
    times = {"jax": 80.0, "triton": 20.0, "torch": 180.0}
    rows = [row | {"backend": name, "device_us": us} for name, us in times.items()]
    (chart,) = op_charts({"ceiling_gb_s": 4000.0, "rows": rows})
    tensors, arrays = chart.sections
    assert [series.name for series in tensors.series] == ["limit by bytes", "triton", "torch.compile", "eager PyTorch"]
    assert tensors.rows == [Row("Qwen3-Next-80B-A3B, 2k tokens", [15.0, 20.0, None, 180.0])]
    assert arrays.rows == [Row("Qwen3-Next-80B-A3B, 2k tokens", [60.0, 80.0])]


@pytest.mark.parametrize(
    ("code", "label"),
    [
        ("T1_D2048", "1 token, 2,048 wide"),
        ("T16384_D2048_g64", "16k tokens, 2,048 wide, groups of 64"),
        ("T16384_D2048_mxfp8", "16k tokens, 2,048 wide, MXFP8"),
        ("L2048_interleaved", "2k tokens, interleaved"),
        ("B1_bfloat16_state", "1 sequence, bfloat16 state"),
        ("64x64_host_grid", "64x64 patches, grid on the host"),
        ("16_images_32k_rows", "16 images, 32k rows"),
        ("one_image_4096", "one image 4096"),
        ("E256_T64_D2048_8_live", "256 experts, 64 tokens, 2,048 wide, 8 live"),
        ("T4096_D2048_mxfp4", "4k tokens, 2,048 wide, MXFP4"),
    ],
)
def test_labels(code, label):
    assert case_label(code) == label
    assert model_label("qwen3_5_35b_a3b") == "Qwen3.5-35B-A3B"
    assert model_label("unknown") == "unknown"


def test_one_axis_for_all_of_a_figure():
    pytest.importorskip("matplotlib")
    ours = (Series("ours", "ours"), Series("limit", "limit"))
    sections = [Section("a", ours, [Row("x", [1.0, 0.001])]), Section("b", ours, [Row("y", [100.0, None])])]
    chart = Chart("", "Title", "ms", sections)
    scale = Scale.of(chart, 200.0)
    assert (scale.least, scale.most) == pytest.approx((1 / 1.12, 112.0))  # a limit may lie off the axis
    assert scale.x(10.0) == pytest.approx(MARGIN + 100.0)
    assert scale.ticks() == [1, 2, 5, 10, 20, 50, 100]
    figure = make_figure(chart, "a device")
    track = WIDTH - 2 * MARGIN - GAP - 2 * COLUMN
    dots = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"]
    in_track = [x for x in dots if x <= MARGIN + track]
    assert in_track == pytest.approx([Scale.of(chart, track).x(1.0), Scale.of(chart, track).x(100.0)])
    assert not figure.axes[0].patches  # no bars


def test_the_layer_is_that_of_the_largest_call():
    larger = LAYER | {"phase": "prefill", "tokens": 64, "us": 90.0, "variant": "untouched"}
    rows = [larger | {"tokens": 8, "us": 9.0}, larger, larger | {"variant": "accelerated", "us": 30.0}]
    (chart,) = model_charts(EMPTY | {"layer": rows})
    (section,) = chart.sections
    assert section.title == "Prefill of 64 tokens"
    # `rest` is less than nothing.
    assert [row.values for row in section.rows] == [[90.0, 30.0], [5.0, 5.0], [4.5, 4.5], [None, None]]


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
