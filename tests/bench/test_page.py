"""docs/benchmarks.md and its figures are what the committed results say."""

import json
import re
from pathlib import Path

import pytest

from polyfuse.bench.measured import bytes_us, read, short
from polyfuse.bench.page import (
    caption,
    conformance,
    layers,
    ops,
    render,
    rules,
    table,
    whole_model,
)
from polyfuse.conformance import Report, Result
from polyfuse.spec import SpecError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
ROW = {"op": "gdn_post_conv", "model": "qwen3_next_80b", "case": "L8", "backend": "triton", "device_us": 20.0}
ROW |= {"host_us": 30.0, "gigabytes_per_s": 3000.0, "eager_ratio": 9.0, "compile_ratio": 2.0}
MADE = {"by": "polyfuse bench", "commit": "0123456", "date": "2026-01-02"}
BENCH = {"made": MADE, "device": "cuda (NVIDIA H200)", "versions": {"torch": "2.11.0"}, "ceiling_gb_s": 4000.0}


def test_the_page_is_up_to_date():
    assert (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8") == render(ROOT / "benchmarks"), "run: make docs"


def test_every_result_is_on_the_page():
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for path in RESULTS.glob("*.json"):
        made = read(path)["made"]
        assert f"[{path.name}](../benchmarks/results/{path.name}): `{made['by']}` at {made['commit']}" in page


@pytest.mark.parametrize("lost", ["made", "commit", "date", "by"])
def test_a_result_that_does_not_say_how_it_was_made_is_refused(lost, tmp_path):
    made = {key: value for key, value in MADE.items() if key != lost}
    path = tmp_path / "h200.json"
    path.write_text(json.dumps(BENCH | {"made": {} if lost == "made" else made}))
    missing = "by, commit, date" if lost == "made" else lost
    with pytest.raises(SpecError, match=rf"^page: h200.json: made: .*none of {missing}"):
        read(path)


def test_a_conformance_report_says_itself_how_it_was_made(tmp_path):
    report = Report("cpu", "full", 0, command="run a\nrun b", commit="0123456", started="2026-01-02T03:04:05Z")
    report.results.append(Result("gdn_post_conv", "mine", "rows_67", "passed"))
    report.finish()
    path = report.write_file(tmp_path / "conformance_x.json")
    data = read(path)
    assert data["made"] == {"by": "run a; run b", "commit": "0123456", "date": "2026-01-02"}
    assert "| gdn_post_conv | 1 |" in conformance({"conformance_x": data})
    earlier = {**data, "finished": "2020-01-01T00:00:00Z", "results": data["results"] * 3}
    assert "| gdn_post_conv | 1 |" in conformance({"conformance_x": data, "conformance_y": earlier})
    report.commit = None
    report.write_file(path)
    with pytest.raises(SpecError, match="none of commit"):
        read(path)


def test_caption():
    assert caption("x", BENCH | {"made": MADE | {"note": "by night"}}) == (
        "[x.json](../benchmarks/results/x.json): `polyfuse bench` at 0123456, 2026-01-02, cuda (NVIDIA H200), "
        "PyTorch 2.11.0; by night."
    )


def test_ops_stand_beside_the_time_of_their_bytes():
    assert bytes_us(ROW, 4000.0) == 15.0
    last = ops({"h200": BENCH | {"rows": [ROW]}}).splitlines()[-1]
    assert last == "| Qwen3-Next-80B-A3B, 8 tokens | 15.0 | 20.0 | 40.0 | 180 | 30.0 |"
    last = ops({"h200": BENCH | {"rows": [ROW | {"compile_ratio": None}]}}).splitlines()[-1]
    assert last == "| Qwen3-Next-80B-A3B, 8 tokens | 15.0 | 20.0 | - | 180 | 30.0 |"


CALL = {"phase": "prefill", "batch": 1, "tokens": 2048, "mode": "eager"}


def test_gains_are_over_the_best_that_a_user_had():
    times = {"untouched": 8.0, "untouched + fla": 3.0, "accelerated": 2.0, "accelerated + fla": 1.5}
    lines = whole_model({"rows": [CALL | {"variant": name, "ms": ms} for name, ms in times.items()]}).splitlines()
    assert lines == [
        "| whole model | mode | best before | ms | accelerated, ms | gain | accelerated + fla, ms | gain "
        "| untouched, ms | untouched + fla, ms |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| prefill of 2,048 tokens | eager | untouched + fla | 3.00 | 2.00 | 1.50x | 1.50 | 2.00x | 8.00 | 3.00 |",
    ]


def test_a_call_that_lacks_a_variant():
    rows = [CALL | {"variant": "accelerated", "ms": 2.0}, CALL | {"variant": "untouched", "tokens": 8, "ms": 4.0}]
    assert whole_model({"rows": rows}).splitlines()[2:] == [
        "| prefill of 2,048 tokens | eager | - | - | 2.00 | - |",
        "| prefill of 8 tokens | eager | untouched | 4.00 | - | - |",
    ]


def test_a_layer_by_its_parts():
    prefill = {"phase": "prefill", "batch": 1, "tokens": 64, "captured": False, "host_us": None, "launches": None}
    decode = {"phase": "decode", "batch": 16, "tokens": 1, "captured": True, "host_us": 301.6, "launches": 31}
    rows = [
        prefill | {"variant": "untouched", "us": 9.0, "parts": {"conv to rule": 4.0, "rest": 5.0}},
        prefill | {"variant": "accelerated", "us": 2.0, "parts": {"rest": 2.0}},
        decode | {"variant": "accelerated", "us": 3.0, "parts": {"rest": 3.0}},
    ]
    first, second = layers({"layer": rows}).split("\n\n")
    assert first.splitlines()[0] == "| one layer |  | all, us | conv to rule, us | rest, us |"
    assert first.splitlines()[2:] == [
        "| prefill of 64 tokens | untouched, not captured | 9.00 | 4.00 | 5.00 |",
        "| prefill of 64 tokens | accelerated, not captured | 2.00 | - | 2.00 |",
    ]
    assert second.splitlines()[0] == "| one layer |  | all, us | rest, us | host, us | launches |"
    assert second.splitlines()[2:] == ["| decode of 16 sequences | accelerated | 3.00 | 3.00 | 302 | 31 |"]


def test_rules_by_variant():
    found = {"untouched": {"prefill": "a", "decode": "b"}, "accelerated": {"prefill": "c"}}
    assert rules({"delta_rule": found}) == "- untouched: prefill by `a`, decode by `b`\n- accelerated: prefill by `c`"
    assert rules({"delta_rule": {"prefill": "a", "decode": "b"}}) == "- all: prefill by `a`, decode by `b`"


def test_a_table_has_its_numbers_to_the_right():
    assert table(("op", "us"), [("a", 1)]) == "| op | us |\n| --- | ---: |\n| a | 1 |"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0.00"),
        (0.0024, "0.002"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (-18.3, "-18.3"),
    ],
)
def test_short(value, text):
    assert short(value) == text


def test_peers_stand_below_the_table_of_their_op():
    peer = {"op": "gdn_post_conv", "model": "qwen3_next_80b", "case": "L8", "peer": "vllm f", "version": "0.33"}
    peer |= {"status": "right", "device_us": 40.0, "cold_us": 45.0, "ratio": 2.0, "cold_ratio": 1.5}
    gone = peer | {"status": "failed", "device_us": None, "cold_us": None, "ratio": None, "cold_ratio": None}
    without = ops({"h200": BENCH | {"rows": [ROW]}})
    assert ops({"h200": BENCH | {"rows": [ROW], "peers": [gone]}}) == without
    assert ops({"h200": BENCH | {"rows": [ROW], "peers": [peer, gone]}}).splitlines()[len(without.splitlines()) :] == [
        "",
        "| case | peer | by the oracle | us | cold, us | times ours | cold, times ours |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
        "| Qwen3-Next-80B-A3B, 8 tokens | vllm f 0.33 | right | 40.0 | 45.0 | 2.00x | 1.50x |",
    ]


def test_every_figure_is_on_the_page_under_its_name():
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[([^\]]+)\]\(\.\./benchmarks/plots/([^)]+)\)\n\n\*(.+)\*\n", page)
    committed = {path.name for path in (ROOT / "benchmarks/plots").iterdir()}
    assert {name for _, name, _ in shown} == committed
    assert len(shown) == len(committed) >= 15
    for alternative, _, under in shown:
        assert len(alternative) > 40
        assert "NVIDIA H200, bfloat16, PyTorch 2.11.0, Triton 3.6.0" in under
