"""`polyfuse bench model` on tiny models: what it runs, and that its numbers belong together."""

import json
from dataclasses import asdict
from functools import partial
from itertools import count

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("transformers")

import transformers

import polyfuse
from polyfuse.bench.model import ModelBench, noting_errors, run_model_bench
from polyfuse.bench.model.conv import measure_conv
from polyfuse.bench.model.layer import layer_row, measure_layer
from polyfuse.bench.model.strategies import measure_strategies
from polyfuse.bench.subjects.text import MODELS, TextModel
from polyfuse.bench.timing import Clock
from polyfuse.cli import main
from polyfuse.configs import model_configs

OPS = "gdn_in_proj", "gdn_conv_prep", "silu_mul_block_quant"


@pytest.fixture(autouse=True, scope="module")
def one_thread_per_op():
    """Threads that wait for one another on busy cores take seconds for what takes a millisecond."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=MODELS)
def subject(request):
    return TextModel(request.param, "cpu", tiny=True)


@pytest.fixture(scope="module")
def dense():
    return TextModel("qwen3_5", "cpu", tiny=True)


@pytest.fixture
def clock(monkeypatch):
    """Every time that is measured is the next of 1, 2, 3, ..., and what is timed runs once."""
    times = count(1.0)

    def measured(self, function, **options):
        function()
        return next(times)

    for name in ("device_us", "queue_us", "latency_ms"):
        monkeypatch.setattr(Clock, name, measured)


@pytest.fixture
def calls(monkeypatch):
    """The names of the ops in the order of their calls."""
    seen = []

    def spy(name, function, *args, **options):
        seen.append(name)
        return function(*args, **options)

    for name in OPS:
        monkeypatch.setattr(polyfuse, name, partial(spy, name, getattr(polyfuse, name)))
    return seen


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    options = ("--tiny", "--device", "cpu", "--no-compile", "--prefill", "16", "--decode", "2", "--out", str(folder))
    result = CliRunner().invoke(main, ["bench", "model", *options])
    assert result.exit_code == 0, result.output
    (path,) = folder.glob("model_qwen3_5_*.json")
    return json.loads(path.read_text()), result.output


def test_whole_models(run):
    rows = run[0]["rows"]
    expected = [("prefill", 1, 0, 16), ("decode", 2, 32, 2)]
    assert [(r["phase"], r["batch"], r["context"], r["tokens"]) for r in rows[::2]] == expected
    assert [r["variant"] for r in rows] == ["untouched", "accelerated"] * 2
    for row in rows:
        assert row["mode"] == "eager"
        assert row["ms"] > 0
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["ms"] * 1e3, rel=1e-3)


def test_layers(run):
    rows = run[0]["layer"]
    assert [(r["phase"], r["batch"], r["tokens"]) for r in rows] == [("prefill", 1, 16), ("decode", 2, 1)]
    for row in rows:
        parts = {part["part"]: part for part in row["parts"]}
        assert list(parts) == ["gdn_in_proj", "gdn_conv_prep", "l2norm", "rest"]
        assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
        for variant in ("untouched_us", "accelerated_us"):
            assert sum(part[variant] for part in parts.values()) == pytest.approx(row[variant], abs=0.01)
        assert parts["l2norm"]["accelerated_us"] == 0
        assert row["delta_rule_us"] > 0


def test_output(run):
    data, text = run
    assert (data["model"], data["sizes"], data["layers"], data["dtype"]) == ("qwen3_5", "tiny", 4, "float32")
    assert data["notes"] == []
    assert "torch" in data["versions"]
    for part in ("gdn_in_proj, us a call", "Conv to delta rule", "One layer without its delta rule", "Whole model"):
        assert f"{part}: tiny, 4 layers, float32, on cpu" in " ".join(text.split())
    assert "delta rule (wall)" in text
    assert "written:" in text


def test_json_round_trip(dense, clock, tmp_path):
    written = []
    result = run_model_bench(dense, [4], [1], compiled=False, on_row=lambda r: written.append(len(r.rows)))
    assert json.loads(result.write(tmp_path).read_text()) == asdict(result)
    assert written == [0] * 6 + [1, 2, 3, 4]
    assert result.write(tmp_path).name == f"model_qwen3_5_{ModelBench.of(dense).device[5:-1]}.json"


def test_delta_rule_is_named(subject):
    name = f"transformers.models.{subject.name}.modeling_{subject.name}.torch_"
    rules = ModelBench.of(subject).delta_rule
    assert rules == {"prefill": f"{name}chunk_gated_delta_rule", "decode": f"{name}recurrent_gated_delta_rule"}


def test_shares():
    before = {"all": 10.0, "gdn_in_proj": 2.0, "gdn_conv_prep": 5.0, "l2norm": 1.0}
    row = layer_row("prefill", 1, 8, before, {"all": 5.0, "gdn_in_proj": 1.0, "gdn_conv_prep": 2.0}, 7.0)
    assert (row.untouched_us, row.accelerated_us, row.delta_rule_us) == (10.0, 5.0, 7.0)
    parts = {p.part: (p.untouched_us, p.accelerated_us, p.saved_us, p.share) for p in row.parts}
    assert parts == {
        "gdn_in_proj": (2.0, 1.0, 1.0, 0.2),
        "gdn_conv_prep": (5.0, 2.0, 3.0, 0.6),
        "l2norm": (1.0, 0.0, 1.0, 0.2),
        "rest": (2.0, 2.0, 0.0, 0.0),
    }


@pytest.mark.parametrize(("phase", "batch", "tokens"), [("prefill", 1, 16), ("decode", 2, 1)])
def test_parts_are_what_they_say(subject, clock, calls, phase, batch, tokens):
    with torch.no_grad():
        row = measure_layer(subject, phase, batch, tokens)
    assert (row.untouched_us, row.accelerated_us, row.delta_rule_us) == (1.0, 6.0, 5000.0)
    parts = {p.part: (p.untouched_us, p.accelerated_us) for p in row.parts}
    assert parts == {"gdn_in_proj": (2.0, 7.0), "gdn_conv_prep": (3.0, 8.0), "l2norm": (4.0, 0.0), "rest": (-8.0, -9.0)}
    # The layer; the projection alone; the projection once, and what follows it.
    assert calls == ["gdn_in_proj", "gdn_conv_prep", "gdn_in_proj", "gdn_in_proj", "gdn_conv_prep"]
    assert "forward" not in vars(subject.layer.out_proj)


def test_between_projections_and_delta_rule_is_the_layers_own(subject):
    parts, x = subject.parts, subject.hidden(2, 9)
    found = {}
    with torch.no_grad():
        for variant in ("untouched", "accelerated"):
            with subject.variant(variant), parts.no_delta_rule() as whole:
                subject.layer(x)
                (query, key, value), options = whole[0]
            with subject.variant(variant), parts.no_projections(x, variant), parts.no_delta_rule(False) as part:
                subject.layer(torch.full_like(x, torch.nan))
                inputs, settings = part[0]
            for a, b in zip(inputs, (query, key, value), strict=True):
                assert torch.equal(a, b)
            normalises = settings["use_qk_l2norm_in_kernel"]
            assert normalises == options["use_qk_l2norm_in_kernel"] == (variant == "untouched")
            found[variant] = [*(parts.l2norm(query, key) if normalises else (query, key)), value, settings["g"]]
    for a, b in zip(found["untouched"], found["accelerated"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_fp8_mlps(clock, calls):
    subject = TextModel("qwen3_5", "cpu", tiny=True, fp8=True)
    x = subject.hidden(1, 6)
    with torch.no_grad(), subject.fp8_linear():
        plain = TextModel("qwen3_5", "cpu", tiny=True).mlp(x)
        untouched = subject.mlp(x)
        with subject.variant("accelerated"):
            accelerated = subject.mlp(x)
        assert calls == ["silu_mul_block_quant"]
        row = measure_layer(subject, "prefill", 1, 16)
    assert torch.equal(untouched, accelerated)
    assert 0 < float((untouched - plain).norm() / plain.norm()) < 0.1
    assert (row.untouched_us, row.accelerated_us) == (1.0 + 6.0, 7.0 + 10.0)
    assert [part.part for part in row.parts][-2:] == ["silu_mul_block_quant", "rest"]
    assert sum(part.share for part in row.parts) == pytest.approx(1)


def test_strategies(dense, clock, calls):
    with torch.no_grad():
        first, second = measure_strategies(dense, [1, 16])
    assert (first.rows, first.captured, first.chosen, second.rows) == (1, False, "sequential", 16)
    assert first.us == {"sequential": 1.0, "parallel": 2.0, "merged": 3.0}
    assert calls == ["gdn_in_proj"] * 6


def test_one_pass_is_the_separate_conv(dense, monkeypatch):
    results = []
    monkeypatch.setattr(Clock, "device_us", lambda self, function: float(len(results.append(function()) or results)))
    with torch.no_grad():
        rows = list(measure_conv(dense, [9], compiled=False))
    assert [(r.tokens, r.variant, r.us, r.ratio) for r in rows] == [(9, "one pass", 1, 1), (9, "separate", 2, 2)]
    for one_pass, separate in zip(*results, strict=False):
        torch.testing.assert_close(one_pass, separate, atol=1e-5, rtol=1e-4)


def test_a_step_forgets_its_token(subject, monkeypatch):
    caches = []
    monkeypatch.setattr(transformers.StaticCache, "reorder_cache", lambda self, index: caches.append(self))
    with torch.no_grad():
        step = subject.step(1)
        step()
        step()
    assert caches[0].layers[3].cumulative_length == subject.context == 32
    assert caches[0].layers[3].keys[:, :, -1].abs().sum() > 0


def test_cache_holds_the_context_of_every_sequence(subject):
    with torch.no_grad():
        cache = subject.cache(3)
    keys, state = cache.layers[3].keys, cache.layers[0].recurrent_states[0]
    assert (len(keys), keys.shape[2], len(state)) == (3, 32, 3)
    assert torch.equal(keys[0], keys[2])


def test_graphs_that_cannot_be_captured_are_noted():
    def rows():
        yield 1
        raise RuntimeError("operation not permitted\nwhile capturing")

    notes = []
    assert list(noting_errors(rows(), notes)) == [1]
    assert notes == ["decode in a graph: operation not permitted"]


@pytest.mark.parametrize(("name", "file"), [("qwen3_next", "qwen3_next_80b"), ("qwen3_5_moe", "qwen3_5_35b_a3b")])
def test_sizes_are_the_real_models(name, file):
    config = getattr(transformers, MODELS[name].class_name).config_class()
    case = model_configs()[file].ops["gdn_post_conv"][0]
    heads = {"num_k_heads": 16, "head_k_dim": 128, "head_v_dim": 128}
    assert case.attrs == heads
    assert (config.linear_num_key_heads, config.linear_key_head_dim, config.linear_value_head_dim) == (16, 128, 128)
    assert (config.linear_num_value_heads, config.hidden_size) == (case.dims["HV"], 2048)
