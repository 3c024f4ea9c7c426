"""Shadow mode: a wrong backend is found on live calls, everything is counted, and off costs nothing."""

import threading
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import polyfuse
from polyfuse import SpecError
from polyfuse.cli import main
from polyfuse.conformance import cases, make_inputs, place, shadow
from polyfuse.dispatch import Backend, Implementation, registry
from polyfuse.dispatch._plan import CALLS
from polyfuse.spec import OPS

OP, DECODE = "silu_mul_block_quant", "gdn_decode"
NAMES = ("POLYFUSE_SHADOW", "POLYFUSE_SHADOW_SEED", "POLYFUSE_SHADOW_DUMP")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    polyfuse.refresh()
    monkeypatch.setattr(shadow, "_counts", {})
    monkeypatch.setattr(shadow, "_numbers", {})
    yield
    polyfuse.shadow_report()
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    polyfuse.refresh()


@pytest.fixture
def every_call(monkeypatch):
    monkeypatch.setenv("POLYFUSE_SHADOW", "1")


def plant(monkeypatch, op, change):
    """Let torch's implementation of an op change its results."""
    load = Backend.load
    right = registry().get("torch").load(op)

    def function(*args, **kwargs):
        return change(right.function(*args, **kwargs), args)

    mine = Implementation(function, right.capability)
    monkeypatch.setattr(
        Backend, "load", lambda self, name: mine if (self.name, name) == ("torch", op) else load(self, name)
    )


def call(rows=4):
    return polyfuse.silu_mul_block_quant(torch.randn(rows, 512), backend="torch")


def counts(op=OP, backend="torch"):
    return polyfuse.shadow_report()[op, backend]


def decode():
    case = next(c for c in cases(DECODE) if c.name == "indices_int32-h2-hv4")
    return place(make_inputs(OPS[DECODE], case), "torch", "cpu")


def test_off_calls_the_backends_own_function():
    call()
    own = registry().get("torch").load(OP).function
    assert CALLS[OP].last[1].function is own
    assert polyfuse.shadow_report() == {}


def test_a_share_of_zero_is_off(monkeypatch):
    monkeypatch.setenv("POLYFUSE_SHADOW", "0")
    call()
    assert CALLS[OP].last[1].function is registry().get("torch").load(OP).function


def test_right_calls_are_counted(every_call):
    for _ in range(5):
        call()
        polyfuse.shadow_report()
    assert counts() == dict.fromkeys(shadow.COUNTED, 0) | {"calls": 5, "sampled": 5, "checked": 5}


def test_a_wrong_backend_is_found_and_its_call_runs_again(every_call, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("POLYFUSE_SHADOW_DUMP", str(tmp_path))

    def wrong(result, _):
        result[1][2] *= 1.5
        return result

    with monkeypatch.context() as patch:
        plant(patch, OP, wrong)
        call()
        assert (counts()["checked"], counts()["violations"]) == (1, 1)
        (file,) = tmp_path.iterdir()
        (message,) = [record.getMessage() for record in caplog.records if "shadow" in record.getMessage()]
        assert message.startswith(f"shadow: {OP}: torch: call 0: scale: 2 of 8 elements wrong; at [2, ")
        assert message.endswith(f"; {file}")
        assert "\n" not in message
        replayed = CliRunner().invoke(main, ["shadow", "replay", str(file), "--device", "cpu"])
        assert replayed.exit_code == 1
        assert replayed.output.count("scale: 2 of 8 elements wrong") == 2
    polyfuse.refresh()
    repaired = CliRunner().invoke(main, ["shadow", "replay", str(file), "--device", "cpu"])
    assert repaired.exit_code == 0
    assert f"recorded  {OP} torch: scale: 2 of 8 elements wrong" in repaired.output
    assert f"now       {OP} torch on cpu: right" in repaired.output


def test_updated_arguments_are_compared_with_what_they_were(every_call):
    arguments = decode()
    for _ in range(2):  # the second call finds the states that the first one left
        polyfuse.gdn_decode(**arguments, backend="torch")
    assert (counts(DECODE)["checked"], counts(DECODE)["violations"]) == (2, 0)


def test_a_wrong_update_is_found(every_call, monkeypatch, tmp_path):
    monkeypatch.setenv("POLYFUSE_SHADOW_DUMP", str(tmp_path))
    names = list(OPS[DECODE].parameters)

    def wrong(result, args):
        args[names.index("recurrent_state")][0] += 1
        return result

    plant(monkeypatch, DECODE, wrong)
    polyfuse.gdn_decode(**decode(), backend="torch")
    assert counts(DECODE)["violations"] == 1
    (file,) = tmp_path.iterdir()
    assert "recurrent_state: " in CliRunner().invoke(main, ["shadow", "replay", str(file), "--device", "cpu"]).output


def test_later_changes_in_place_do_not_disturb(every_call):
    x = torch.randn(4, 512)
    _, scale = polyfuse.silu_mul_block_quant(x, backend="torch")
    x.zero_()
    scale.zero_()
    assert (counts()["checked"], counts()["violations"]) == (1, 0)


def test_what_waits_too_long_is_dropped(every_call, monkeypatch):
    going = threading.Event()
    problem_of = shadow.problem_of
    monkeypatch.setattr(shadow, "problem_of", lambda *args: going.wait(30) and problem_of(*args))
    for _ in range(shadow.WAITING + 5):
        call()
    going.set()
    found = counts()
    assert found["sampled"] == shadow.WAITING + 5
    assert found["dropped"] >= 4  # one may be in the thread's hands
    assert found["checked"] + found["dropped"] == found["sampled"]


def test_large_calls_are_left_out(every_call, monkeypatch):
    monkeypatch.setattr(shadow, "LARGEST", 3000)
    call(4)
    call(8)
    assert {name: counts()[name] for name in ("calls", "sampled", "too_large")} == {
        "calls": 2,
        "sampled": 1,
        "too_large": 1,
    }


def test_a_traced_call_is_left_out(every_call):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 512)), jnp.float32)
    jax.jit(polyfuse.silu_mul_block_quant)(x)
    polyfuse.silu_mul_block_quant(x)
    found = counts(backend="jax")
    assert (found["calls"], found["sampled"], found["traced"], found["violations"]) == (2, 1, 1, 0)


def test_a_compiled_call_is_sampled_when_it_runs(every_call):
    compiled = torch.compile(lambda x: polyfuse.silu_mul_block_quant(x)[1] * 2, fullgraph=True, backend="eager")
    with polyfuse.use_backend("torch"), torch.no_grad():
        compiled(torch.randn(4, 512))
        compiled(torch.randn(4, 512))
    assert (counts()["calls"], counts()["checked"], counts()["errors"]) == (2, 2, 0)


def test_a_capturing_stream_is_left_out(every_call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call()
    assert (counts()["sampled"], counts()["traced"]) == (0, 1)


def chosen(monkeypatch, share, seed, number=300):
    """Which of so many calls are sampled."""
    monkeypatch.setattr(shadow, "_numbers", {})
    seen = []
    monkeypatch.setattr(shadow, "_hand_over", lambda sample, _: seen.append(sample.number))
    function = shadow.watched(OP, "torch", registry().get("torch").load(OP).function, share, seed)
    x = torch.randn(1, 256)
    for _ in range(number):
        function(x, group_size=128)
    return seen


def test_the_seed_decides_which_calls(monkeypatch):
    first = chosen(monkeypatch, 0.1, 0)
    assert first == chosen(monkeypatch, 0.1, 0)
    assert first != chosen(monkeypatch, 0.1, 1)
    assert set(first) < set(chosen(monkeypatch, 0.3, 0))
    assert 15 < len(first) < 50


def test_threads_share_one_sequence(monkeypatch):
    alone = chosen(monkeypatch, 0.2, 5, 200)
    monkeypatch.setattr(shadow, "_numbers", {})
    monkeypatch.setattr(shadow, "_counts", {})
    seen = []
    monkeypatch.setattr(shadow, "_hand_over", lambda sample, _: seen.append(sample.number))
    function = shadow.watched(OP, "torch", registry().get("torch").load(OP).function, 0.2, 5)
    x = torch.randn(1, 256)
    threads = [threading.Thread(target=lambda: [function(x, group_size=128) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(seen) == Counter(alone)
    assert shadow._counts[OP, "torch"]["calls"] == 200


def test_a_check_that_fails_itself_is_counted(every_call, monkeypatch, caplog):
    def failing(*_):
        raise ZeroDivisionError("deliberate")

    monkeypatch.setattr(shadow, "problem_of", failing)
    call()
    assert (counts()["errors"], counts()["checked"]) == (1, 0)
    assert "the check failed: ZeroDivisionError: deliberate" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("POLYFUSE_SHADOW", value, "a number from 0 to 1") for value in ("often", "1.5", "-0.1", "nan", "1%")),
        ("POLYFUSE_SHADOW_SEED", "-1", "an integer >= 0"),
        ("POLYFUSE_SHADOW_SEED", "one", "an integer >= 0"),
    ],
)
def test_a_value_that_is_none(monkeypatch, name, value, expected):
    monkeypatch.setenv(name, value)
    with pytest.raises(SpecError, match=f"environment variable {name}: expected {expected}, got '{value}'"):
        call()


def test_a_name_that_is_none(monkeypatch):
    monkeypatch.setenv("POLYFUSE_SHADOWS", "1")
    with pytest.raises(SpecError, match=r"POLYFUSE_SHADOWS: unknown; did you mean POLYFUSE_SHADOW\?"):
        call()


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"garbage")
    done = CliRunner().invoke(main, ["shadow", "replay", str(tmp_path / "a.npz")])
    assert done.exit_code == 2
    assert "not a call that shadow mode has written" in done.output
    assert CliRunner().invoke(main, ["shadow", "replay", str(tmp_path / "none.npz")]).exit_code == 2
