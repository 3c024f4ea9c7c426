"""`polyfuse bench encoder` on tiny models: what it runs, and that its numbers belong together."""

import json
from dataclasses import asdict
from itertools import islice

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("transformers")

from polyfuse.bench.encoder import EncoderBench, parallel
from polyfuse.bench.encoder.tower import TOWER, equals_uncaptured, measure_tower
from polyfuse.bench.encoder.trace import load_requests, measure_trace
from polyfuse.bench.ops import Bench
from polyfuse.bench.results import write_json
from polyfuse.bench.subjects.vision import VisionModel
from polyfuse.cli import main
from polyfuse.runtime.encoder import manager as encoder
from polyfuse.runtime.packing.planner import suggest_budgets

TRACE = [
    [[1, 4, 6]],
    [[1, 8, 8], [1, 4, 4]],
    [[1, 6, 6], [2, 4, 4], [1, 2, 2]],
    [[1, 4, 6], [1, 4, 6], [1, 12, 22]],
    [[1, 8, 8]],
    [[1, 10, 8], [1, 6, 4]],
]
TOKENS = [sum(t * h * w for t, h, w in request) // 4 for request in TRACE]
MEASURED = 4


@pytest.fixture(autouse=True, scope="module")
def one_thread_per_op():
    """Threads that wait for one another on busy cores take seconds for what takes a millisecond."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def invoke(folder, *args):
    result = CliRunner().invoke(main, ["bench", "encoder", "--tiny", "--device", "cpu", "--out", str(folder), *args])
    assert result.exit_code == 0, result.output
    (path,) = folder.glob("encoder_*.json")
    return json.loads(path.read_text()), result.output


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    path.write_text(json.dumps(TRACE))
    return str(path)


@pytest.fixture(scope="module")
def run(trace_file, tmp_path_factory):
    return invoke(tmp_path_factory.mktemp("out"), "--trace", trace_file, "--requests", str(MEASURED))


@pytest.fixture(scope="module")
def subject():
    return VisionModel("qwen3_vl", "cpu", tiny=True)


def test_real_tower_requests():
    assert [sum(t * h * w for t, h, w in request) for request in TOWER] == [256, 1024, 4096, 15048]
    assert [len(request) for request in TOWER] == [1, 1, 1, 8]
    assert all(h % 2 == w % 2 == 0 for request in TOWER for _, h, w in request)


def test_tower(run):
    rows = run[0]["tower"]
    variants = ["untouched", "adapter", "graph", "graph, watched"]
    assert [(r["rows"], r["items"], r["variant"]) for r in rows] == [
        (patches, items, variant) for patches, items in ((16, 1), (64, 1), (256, 1), (840, 8)) for variant in variants
    ]
    for row in rows:
        assert row["ms"] > 0
        assert row["device_ms"] > 0
        if row["variant"].startswith("graph"):
            assert row["equal"] is True
            assert set(row["difference"]) == {"last_hidden_state", "pooler_output", "deepstack_features"}
            assert 0 < max(row["difference"].values()) < 1e-5
        else:
            assert row["equal"] is None


def test_trace(run):
    rows = {row["variant"]: row for row in run[0]["trace"]}
    assert list(rows) == ["untouched", "greedy", "optimal"]
    items, tokens = sum(map(len, TRACE[:MEASURED])), sum(TOKENS[:MEASURED])
    for row in rows.values():
        assert (row["requests"], row["items"], row["tokens"]) == (MEASURED, items, tokens)
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert 0 < row["host_ms"] <= row["mean_ms"]
        assert row["requests_per_s"] == pytest.approx(1e3 / row["mean_ms"], rel=1e-2)
        assert row["items_per_s"] == pytest.approx(row["requests_per_s"] * items / MEASURED, rel=1e-2)
        assert row["tokens_per_s"] == pytest.approx(row["requests_per_s"] * tokens / MEASURED, rel=1e-2)


def test_graphs_of_the_trace(run):
    untouched, greedy, optimal = (row["graphs"] for row in run[0]["trace"])
    assert untouched is None
    assert greedy["policy"] == "greedy"
    assert (greedy["replays"], greedy["eager_batches"]) == ({"64": 4}, 1)  # an image of 66 tokens
    assert greedy["budgets"] == [64]
    assert optimal["budgets"] == list(suggest_budgets(TOKENS[MEASURED:], smallest=1, largest=26))
    for graphs in (greedy, optimal):
        assert (graphs["requests"], graphs["items"]) == (MEASURED, sum(map(len, TRACE[:MEASURED])))
        replayed = sum(int(budget) * count for budget, count in graphs["replays"].items())
        assert graphs["tokens"] + graphs["padding"] == replayed
        assert graphs["waste"] == pytest.approx(graphs["padding"] / max(1, replayed))
        assert 0 <= graphs["waste"] < 1
        assert sum(graphs["replays"].values()) + graphs["eager_batches"] >= MEASURED
        assert graphs["capture_seconds"] > 0
        assert graphs["compiled_blocks"] is False


def test_output(run):
    data, text = run
    assert data["model"] == "qwen3_vl"
    assert data["dtype"] == "float32"
    assert "torch" in data["versions"]
    assert data["parallel"] == []
    assert "One request: qwen3_vl, 2 layers, float32, on cpu" in text
    assert f"{MEASURED} requests, {sum(map(len, TRACE[:MEASURED]))} items" in text
    assert "written:" in text


def test_one_part_and_policy_of_a_fixed_resolution(trace_file, tmp_path):
    options = ("--model", "siglip", "--part", "trace", "--policy", "greedy", "--trace", trace_file, "--requests", "6")
    data, _ = invoke(tmp_path, *options)
    assert data["tower"] == []
    assert [row["variant"] for row in data["trace"]] == ["untouched", "greedy"]
    greedy = data["trace"][1]
    assert greedy["items"] == sum(map(len, TRACE))
    assert greedy["tokens"] == 16 * greedy["items"]
    assert greedy["graphs"]["replays"] == {"64": 6}


def test_a_replay_that_differs_is_not_equal(subject, monkeypatch):
    scatter = encoder.scatter
    monkeypatch.setattr(encoder, "scatter", lambda outputs, *rest: scatter({n: -x for n, x in outputs.items()}, *rest))
    row = list(islice(measure_tower(subject), 3))[-1]
    assert row.equal is False
    assert all(difference == pytest.approx(2, rel=1e-3) for difference in row.difference.values())


def test_an_eager_batch_is_no_replay(subject):
    subject.reserve(24)
    manager = encoder.EncoderGraphManager(subject.encoder(), budgets=[4], policy="greedy")
    assert not equals_uncaptured(manager, subject.arguments([[1, 4, 6]]), 4)


def test_policies_are_measured_alone(subject):
    rows = measure_trace(subject, TRACE[:1], TRACE[:1], ["optimal"])
    assert [row.variant for row in rows] == ["untouched", "optimal"]


def test_requests(trace_file):
    assert load_requests(trace_file, 4) == (TRACE[:4], TRACE[4:])
    assert load_requests(trace_file, 6) == (TRACE, TRACE)
    trace, sample = load_requests(None, 10)
    assert len(trace) == 10
    assert len(sample) == 2000
    assert sample[:10] != trace


def test_one_rank_of_torchrun(monkeypatch, tmp_path):
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel, "REQUESTS", 2)
    monkeypatch.setattr(parallel, "IMAGES", 3)
    data, text = invoke(tmp_path, "--data-parallel")
    assert [row["variant"] for row in data["parallel"]] == ["one rank", "1 ranks"]
    for row in data["parallel"]:
        assert (row["requests"], row["items"], row["tokens"]) == (2, 6, 600)
    assert "speed-up" in text
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("device", ["cpu (x86_64)", "cuda (NVIDIA H200)", "cuda:1 (NVIDIA H100 80GB HBM3)", "xpu"])
def test_files_are_named_as_the_op_bench_names_them(device, tmp_path):
    name = Bench(device, 1.0).write(tmp_path).name
    assert write_json(tmp_path, "", device, {}).name == name
    assert EncoderBench(device, "", "", 1).write(tmp_path).name == f"encoder_{name}"
    assert EncoderBench(device, "", "", 1, ranks=4).write(tmp_path).name == f"encoder_4x_{name}"


@pytest.mark.parametrize(("name", "tokens"), [("qwen3_vl", 100), ("qwen2_5_vl", 144)])
def test_subject_of_336_pixels(name, tokens):
    subject = VisionModel(name, "cpu", tiny=True)
    side = subject.merge * round(336 / (subject.patch_size * subject.merge))
    assert subject.tokens([[1, side, side]]) == tokens
    assert asdict(EncoderBench.of(subject))["depth"] == 2
