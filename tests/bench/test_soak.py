"""`polyfuse soak encoder` on tiny models: that it passes, and that it notices each kind of fault."""

import json

import click
import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("transformers")

from polyfuse.bench import soak
from polyfuse.bench.soak import Soak, SoakResult, row_difference
from polyfuse.bench.subjects.vision import MODELS, VisionModel, uncaptured
from polyfuse.cli import main
from polyfuse.cli.soak.encoder import command as soak_encoder
from polyfuse.runtime.encoder import manager as encoder
from polyfuse.runtime.encoder.manager import EncoderGraphManager


@pytest.fixture(autouse=True, scope="module")
def one_thread_per_op():
    """Threads that wait for one another on busy cores take seconds for what takes a millisecond."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def subject():
    return VisionModel("qwen3_vl", "cpu", tiny=True, depth=1)


def invoke(folder, *args):
    result = CliRunner().invoke(
        main, ["soak", "encoder", "--tiny", "--depth", "1", "--device", "cpu", "--out", str(folder), *args]
    )
    (path,) = folder.glob("soak_encoder_*.json")
    return result, json.loads(path.read_text())


@pytest.mark.slow
def test_500_batches(tmp_path):
    result, data = invoke(tmp_path, "--batches", "500", "--seed", "1")
    assert result.exit_code == 0, result.output
    assert data["ok"] is True
    assert (data["batches"], data["mismatches"], data["messages"]) == (500, 0, [])
    assert 2500 < data["items"] < 4000
    assert data["repeated"] == 50
    assert 20 < data["poisoned"] < 100
    assert 0 < data["worst"] <= data["bound"] == 5e-6
    assert data["stats"]["requests"] == 550
    assert data["stats"]["eager_items"] > 3
    assert len(data["stats"]["replays"]) > 8
    assert len(data["allocated"]) == len(data["reserved"]) == 2
    assert data["allocated"][0] <= data["allocated"][1]
    assert "500 of" in result.output
    assert "written:" in result.output


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("qwen3_5", "siglip") else ()) for name in MODELS]
)
def test_every_model(name):
    result = Soak(VisionModel(name, "cpu", tiny=True, depth=1), batches=12, threads=2).run()
    assert result.messages == []
    assert result.batches == 12
    assert result.stats["replays"]


def test_models_are_the_command_lines():
    (option,) = (option for option in soak_encoder.params if option.name == "model")
    assert isinstance(option.type, click.Choice)
    assert list(option.type.choices) == list(MODELS)


@pytest.mark.slow
def test_a_batch_depends_on_the_seed_and_its_number(subject):
    counts = [Soak(subject, 9, threads, seed).run().items for threads, seed in ((1, 0), (3, 0), (3, 1))]
    assert counts[0] == counts[1] != counts[2]


def shifted(monkeypatch):
    scatter = encoder.scatter

    def sabotaged(outputs, *rest):
        scatter({name: rows.roll(1, 0) for name, rows in outputs.items()}, *rest)

    monkeypatch.setattr(encoder, "scatter", sabotaged)


def one_row_wrong(monkeypatch):
    run = EncoderGraphManager.run

    def sabotaged(self, request, indices=None):
        outputs = run(self, request, indices)
        outputs["pooler_output"][-1] *= 1.001
        return outputs

    monkeypatch.setattr(EncoderGraphManager, "run", sabotaged)


def padding_leaks(monkeypatch):
    # The capture would find it, and refuse graphs.
    monkeypatch.setattr("polyfuse.runtime.encoder.manager.reads_padding", lambda *_: "")
    make = VisionModel.encoder

    def sabotaged(self, compiled=None):
        encoder = make(self, compiled)
        forward = encoder.forward

        def leaking(inputs, capacity):
            used = int(inputs["grid"].prod(-1).sum())
            leak = inputs["pixels"][used:].sum()
            return {name: rows + 0 * leak for name, rows in forward(inputs, capacity).items()}

        encoder.forward = leaking
        return encoder

    monkeypatch.setattr(VisionModel, "encoder", sabotaged)


def overwritten(monkeypatch):
    run, earlier = EncoderGraphManager.run, []

    def sabotaged(self, request, indices=None):
        earlier.append(run(self, request, indices))
        if len(earlier) > 2:
            earlier.pop(0)["last_hidden_state"].zero_()
        return earlier[-1]

    monkeypatch.setattr(EncoderGraphManager, "run", sabotaged)


def unstable(monkeypatch):
    run, calls = EncoderGraphManager.run, []

    def sabotaged(self, request, indices=None):
        calls.append(None)
        return {name: rows * (1 + 1e-6 * (len(calls) % 2)) for name, rows in run(self, request, indices).items()}

    monkeypatch.setattr(EncoderGraphManager, "run", sabotaged)


def raising(monkeypatch):
    def sabotaged(self, request, indices=None):
        raise RuntimeError("the graph is gone")

    monkeypatch.setattr(EncoderGraphManager, "run", sabotaged)


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        pytest.param(shifted, "a row differs by 1.", marks=pytest.mark.slow),
        pytest.param(one_row_wrong, "a row differs by 1.0e-03 of its norm, in [[", marks=pytest.mark.slow),
        (padding_leaks, "a row differs by nan of its norm"),
        pytest.param(overwritten, "outputs were overwritten after they had been returned", marks=pytest.mark.slow),
        (unstable, "other values the second time, in [["),
        pytest.param(raising, "RuntimeError: the graph is gone", marks=pytest.mark.slow),
    ],
)
def test_a_fault_is_found(sabotage, message, monkeypatch, tmp_path):
    sabotage(monkeypatch)
    monkeypatch.setattr(soak, "POISON_SHARE", 1.0)
    result, data = invoke(tmp_path, "--batches", "24", "--threads", "1")
    assert result.exit_code == 1
    assert data["ok"] is False
    assert data["mismatches"] > 0
    assert any(message in text for text in data["messages"]), data["messages"]
    assert f"mismatch {data['messages'][0]}" in result.output


@pytest.mark.parametrize(
    ("allocated", "mismatches", "ok"),
    [
        ([10**10, 10**10 + 10**8 + 2**26], 0, True),
        ([10**10, 10**10 + 10**8 + 2**26 + 1], 0, False),
        ([10**10, 10**9], 0, True),
        ([0, 0], 1, False),
    ],
)
def test_ok(allocated, mismatches, ok):
    assert SoakResult("", "", 1, 0, 1, 1e-5, mismatches=mismatches, allocated=allocated).ok is ok


def test_row_difference():
    expected = {"a": torch.ones(3, 4), "b": torch.full((2, 4), 10.0)}
    outputs = {name: rows.clone() for name, rows in expected.items()}
    assert row_difference(outputs, expected) == 0
    outputs["b"][1, 2] += 2
    assert row_difference(outputs, expected) == pytest.approx(0.1)
    outputs["a"][0, 0] = torch.nan
    assert row_difference(outputs, expected) != row_difference(outputs, expected)


def test_uncaptured_is_the_untouched_model(subject):
    subject.reserve(64)
    given = subject.arguments([[1, 4, 6], [2, 2, 4]], start=3)
    assert torch.equal(given[0], subject.arguments([[1, 8, 8]])[0][3:43])
    with torch.no_grad():
        theirs = subject.model(*given)
    ours = uncaptured(subject.encoder(), *given)
    expected = {"last_hidden_state": theirs.last_hidden_state, "pooler_output": theirs.pooler_output}
    assert row_difference(ours, expected) < 1e-5
