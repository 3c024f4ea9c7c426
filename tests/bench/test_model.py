"""`polyfuse bench model` on tiny models: what it runs, and that its numbers belong together."""

import json
from dataclasses import asdict
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch.profiler import ProfilerActivity

pytest.importorskip("transformers")

import transformers

import polyfuse
from polyfuse.bench.model import PARTS as PARTS_OF_RESULTS
from polyfuse.bench.model import ModelBench, run_model_bench
from polyfuse.bench.model.conv import measure_conv
from polyfuse.bench.model.layer import launches, measure_layer
from polyfuse.bench.model.rules import delta_rules
from polyfuse.bench.model.strategies import measure_strategies
from polyfuse.bench.subjects.gated_delta_net import PARTS
from polyfuse.bench.subjects.text import MODELS, TextModel
from polyfuse.bench.timing import Clock
from polyfuse.cli import main
from polyfuse.cli.bench.model import command
from polyfuse.configs import model_configs

OPS = (
    "gdn_in_proj",
    "gdn_conv_prep",
    "gated_delta_rule",
    "gated_rms_norm",
    "gdn_decode",
    "block_quant",
    "silu_mul_block_quant",
)


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
    calls = [("prefill", 1, 16)] * 2 + [("decode", 2, 1)] * 2
    assert [(r["phase"], r["batch"], r["tokens"]) for r in rows] == calls
    assert [r["variant"] for r in rows] == ["untouched", "accelerated"] * 2
    for row in rows:
        assert list(row["parts"]) == [*PARTS[row["phase"]], "rest"]
        assert sum(row["parts"].values()) == pytest.approx(row["us"], abs=0.01)
        assert (row["host_us"] is not None) == (row["phase"] == "decode")
        assert row["launches"] is None
        assert row["captured"] is False


def test_output(run):
    data, text = run
    assert (data["model"], data["sizes"], data["layers"], data["dtype"]) == ("qwen3_5", "tiny", 4, "float32")
    assert data["notes"] == TextModel("qwen3_5", "cpu", tiny=True).notes
    assert "torch" in data["versions"]
    words = " ".join(text.split())
    for part in ("gdn_in_proj, us a call", "Conv to delta rule", "One layer, us, decode", "Whole model"):
        assert f"{part}: tiny, 4 layers, float32, on cpu" in words
    assert "delta rule, accelerated: prefill by polyfuse.gated_delta_rule (torch), decode by polyfuse.gdn_dec" in words
    assert all(f"note {note}" in words for note in data["notes"])
    assert "written:" in text


def test_the_table_leads_with_the_best_that_a_user_had(run):
    data, text = run
    line = next(line for line in text.splitlines() if "prefill of 16 tokens" in line and "eager" in line)
    before, after = (row["ms"] for row in data["rows"][:2])
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    expected = ["prefill of 16 tokens", "eager", "untouched", f"{before:.2f}", f"{after:.2f}", f"{before / after:.2f}x"]
    assert cells == expected


def test_a_line_for_each_row_as_it_comes(run):
    data, text = run
    lines = text.splitlines()
    for row in data["rows"]:
        assert sum(line.startswith(f"model, {row['phase']} of") and row["variant"] in line for line in lines) == 1
    assert sum(line.startswith("layer, ") for line in lines) == len(data["layer"])
    assert sum(line.startswith("gdn_in_proj, ") for line in lines) == len(data["strategies"])
    assert sum(line.startswith("conv, ") for line in lines) == len(data["conv"])


def test_every_part_can_be_asked_for():
    (option,) = [option for option in command.params if option.name == "parts"]
    assert tuple(option.type.choices) == PARTS_OF_RESULTS


def test_one_part(tmp_path):
    options = ("--tiny", "--device", "cpu", "--part", "rows", "--prefill", "4", "--decode", "1", "--out", str(tmp_path))
    result = CliRunner().invoke(main, ["bench", "model", *options])
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    data = json.loads(path.read_text())
    assert [len(data[part]) for part in ("rows", "layer", "strategies", "conv")] == [4, 0, 0, 0]
    assert "One layer" not in result.output


def test_json_round_trip(dense, clock, tmp_path):
    written = []

    def on_row(result, row):
        result.write(tmp_path)
        written.append(type(row).__name__)

    result = run_model_bench(dense, [4], [1], compiled=False, on_row=on_row)
    assert json.loads(result.write(tmp_path).read_text()) == asdict(result)
    assert written == ["ModelRow"] * 4 + ["LayerRow"] * 4 + ["StrategyRow"] * 2 + ["ConvRow"] * 2
    assert result.write(tmp_path).name == f"model_qwen3_5_{ModelBench.of(dense).device[5:-1]}.json"


def test_delta_rule_is_named(subject):
    name = f"transformers.models.{subject.name}.modeling_{subject.name}.torch_"
    with torch.no_grad():
        found = delta_rules(subject, [("prefill", 1, 9), ("decode", 2, 1)], [])
    assert found == {
        "untouched": {"prefill": f"{name}chunk_gated_delta_rule", "decode": f"{name}recurrent_gated_delta_rule"},
        "accelerated": {"prefill": "polyfuse.gated_delta_rule (torch)", "decode": "polyfuse.gdn_decode (torch)"},
    }


@pytest.mark.parametrize(
    ("variant", "phase", "times"),
    [
        ("untouched", "prefill", [2.0, 6.0, 3.0, 4.0, 5.0]),  # the second part is what is left, and timed last
        ("accelerated", "prefill", [2.0, 3.0, 4.0, 5.0, 6.0]),
        ("untouched", "decode", [2.0, 4.0, 3.0]),
        ("accelerated", "decode", [2.0, 3.0, 4.0]),
    ],
)
def test_parts_are_timed_alone(subject, clock, variant, phase, times):
    batch, tokens = (1, 16) if phase == "prefill" else (2, 1)
    with torch.no_grad():
        row = measure_layer(subject, phase, batch, tokens, variant)
    assert row.us == 1.0
    assert row.parts == dict(zip(PARTS[phase], times, strict=True)) | {"rest": 1.0 - sum(times)}
    assert row.host_us == (len(times) + 2.0 if phase == "decode" else None)
    assert "forward" not in vars(subject.layer.out_proj)


def test_a_layer_that_no_graph_holds_is_timed_by_events(dense, monkeypatch):
    def fails(self, function):
        raise RuntimeError("operation not permitted while capturing")

    monkeypatch.setattr(Clock, "device_us", fails)
    monkeypatch.setattr(Clock, "event_us", lambda self, function, rounds: 2.0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="not permitted"):
        measure_layer(dense, "prefill", 1, 4, "accelerated")
    monkeypatch.setattr(dense, "captures", True)
    with torch.no_grad():
        row = measure_layer(dense, "prefill", 1, 4, "accelerated")
    assert (row.captured, row.us) == (False, 2.0)
    assert row.parts == dict.fromkeys(PARTS["prefill"], 2.0) | {"rest": -8.0}


def test_ops_of_an_accelerated_layer(subject, clock, calls):
    with torch.no_grad():
        measure_layer(subject, "prefill", 1, 16, "accelerated")
    layer = ["gdn_in_proj", "gdn_conv_prep", "gated_delta_rule", "gated_rms_norm"]
    assert calls == layer * 3  # the layer, the layer with its parts noted, and each part alone


@pytest.mark.parametrize("variant", ["untouched", "accelerated"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_parts_get_the_layers_own_tensors(subject, phase, variant):
    parts, x = subject.parts, subject.hidden(*((1, 9) if phase == "prefill" else (2, 1)))
    with torch.no_grad(), subject.variant(variant):
        call = partial(subject.layer, x, subject.cache(2) if phase == "decode" else None)
        found = parts.calls(phase, variant, call)
        (projected,) = found["in projections"].args[0][:1]
        assert torch.equal(projected.args[0].flatten(0, -2), x.flatten(0, 1))
        if phase == "prefill":  # without states, a call changes nothing that the next one reads
            (last,) = found["out projection"].args[0]
            assert torch.equal(last(), call())
    expected = list(PARTS[phase])
    if variant == "untouched":
        del expected[1]
    assert list(found) == expected


def test_what_is_left_of_an_untouched_layer_computes_nothing_that_is_a_part(subject):
    parts, x = subject.parts, subject.hidden(1, 9)
    with torch.no_grad():
        whole = subject.layer(x)
        with parts.what_is_left("prefill", "untouched", partial(subject.layer, x)):
            assert torch.equal(subject.layer(torch.full_like(x, torch.nan)), whole)
        assert subject.layer(torch.full_like(x, torch.nan)).isnan().all()


def test_launches_are_those_of_a_cuda_device(monkeypatch):
    assert launches(lambda: 1 / 0, "cpu") is None
    made = ["CPU", "CUDA", "CUDA"]

    class Profile:
        def __init__(self, activities):
            assert ProfilerActivity.CUDA in activities

        def __enter__(self):
            return self

        def __exit__(self, *_):
            calls.append("end")

        def events(self):
            return [SimpleNamespace(device_type=SimpleNamespace(name=kind)) for kind in made]

    calls = []
    monkeypatch.setattr("polyfuse.bench.model.layer.profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(device))
    assert launches(lambda: calls.append("call"), "cuda:0") == 2
    assert calls == ["call", "cuda:0", "end"]
    made.clear()
    assert launches(lambda: None, "cuda:0") is None


def test_fp8_mlps(clock, calls):
    subject = TextModel("qwen3_5", "cpu", tiny=True, fp8=True)
    x = subject.hidden(1, 6)
    with torch.no_grad(), subject.fp8_linear():
        plain = TextModel("qwen3_5", "cpu", tiny=True).mlp(x)
        untouched = subject.mlp(x)
        with subject.variant("accelerated"):
            accelerated = subject.mlp(x)
        assert calls == ["silu_mul_block_quant"]
        row = measure_layer(subject, "prefill", 1, 16, "accelerated")
    assert torch.equal(untouched, accelerated)
    assert 0 < float((untouched - plain).norm() / plain.norm()) < 0.1
    assert list(row.parts) == [*PARTS["prefill"], "MLP", "rest"]
    assert (row.us, row.parts["MLP"], row.parts["rest"]) == (1.0 + 7.0, 7.0, 1.0 - 20.0)


def test_fp8_experts(clock, calls):
    subject = TextModel("qwen3_5_moe", "cpu", tiny=True, fp8=True)
    x = subject.hidden(1, 6)
    with torch.no_grad(), subject.fp8_linear():
        routed = subject.routed(x)
        assert [tuple(array.shape) for array in routed] == [(6, 128), (6, 2), (6, 2)]
        plain = TextModel("qwen3_5_moe", "cpu", tiny=True).experts(*routed)
        untouched = subject.experts(*routed)
        assert calls == []
        with subject.variant("accelerated"):
            accelerated = subject.experts(*routed)
        assert calls == ["block_quant", "silu_mul_block_quant"]
        row = measure_layer(subject, "prefill", 1, 16, "accelerated")
    assert torch.equal(untouched, accelerated)
    assert 0 < float((untouched - plain).norm() / plain.norm()) < 0.1
    assert list(row.parts) == [*PARTS["prefill"], "MLP", "experts", "rest"]
    assert (row.us, row.parts["experts"]) == (1.0 + 7.0 + 8.0, 8.0)
    assert subject.notes[-1].startswith("untouched experts run Transformers' loop")


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


def test_what_cannot_be_captured_is_noted_and_the_rest_goes_on(dense, monkeypatch):
    monkeypatch.setattr(dense, "captures", True)

    def fails(self, function):
        raise RuntimeError("operation not permitted\nwhile capturing")

    monkeypatch.setattr(Clock, "device_us", fails)
    result = run_model_bench(dense, [4], [1], parts=["rows"])
    assert [(row.phase, row.mode) for row in result.rows] == [("prefill", "eager")] * 2 + [("decode", "eager")] * 2
    assert result.notes[len(dense.notes) :] == [
        "decode of 1, graph, untouched: operation not permitted",
        "decode of 1, graph, accelerated: operation not permitted",
    ]


@pytest.mark.parametrize(("name", "file"), [("qwen3_next", "qwen3_next_80b"), ("qwen3_5_moe", "qwen3_5_35b_a3b")])
def test_sizes_are_the_real_models(name, file):
    config = getattr(transformers, MODELS[name].class_name).config_class()
    case = model_configs()[file].ops["gdn_post_conv"][0]
    heads = {"num_k_heads": 16, "head_k_dim": 128, "head_v_dim": 128}
    assert case.attrs == heads
    assert (config.linear_num_key_heads, config.linear_key_head_dim, config.linear_value_head_dim) == (16, 128, 128)
    assert (config.linear_num_value_heads, config.hidden_size) == (case.dims["HV"], 2048)
