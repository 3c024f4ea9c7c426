"""The command line as a user meets it."""

import importlib.util
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

import polyfuse
from polyfuse.cli import main
from polyfuse.spec import OPS

OP = "pos_embed_interpolate"


@pytest.fixture(autouse=True)
def fresh():
    polyfuse.refresh()
    yield
    polyfuse.refresh()


def invoke(*args, env=None):
    return CliRunner().invoke(main, list(args), env=env)


@pytest.mark.parametrize(
    "command",
    [
        "info",
        "doctor",
        "ops",
        "explain",
        "conformance",
        "bench",
        "bench host",
        "bench encoder",
        "soak",
        "soak encoder",
        "demo",
        "new-backend",
        "warmup",
    ],
)
def test_every_command_has_help_with_an_example(command):
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Example:" in result.output
    assert f"polyfuse {command}" in result.output.split("Example:")[1]


def test_explain_names_winner_losers_and_source():
    result = invoke("explain", OP, env={"POLYFUSE_BACKEND": "triton"})
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert any("triton" in x and "chosen" in x and "environment variable POLYFUSE_BACKEND" in x for x in lines)
    assert any("torch" in x and "not named by environment variable POLYFUSE_BACKEND" in x for x in lines)
    assert any("pallas" in x and "takes jax arrays" in x for x in lines)
    assert "preference: triton  from environment variable POLYFUSE_BACKEND" in result.output


def test_explain_as_json():
    data = json.loads(invoke("explain", OP, "--json", "--family", "jax").output)
    assert data["winner"] == "jax"
    assert {c["name"] for c in data["candidates"]} == {"numpy", "jax", "pallas", "torch", "triton"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["explain", "nope"], f"op: expected one of {OP}"),
        (["explain", OP, "--family", "tf"], "'tf' is not one of 'torch', 'jax', 'numpy'"),
        (["conformance", "--op", "nope"], "got 'nope'"),
        (
            ["conformance", "--backend", "nope"],
            "backend: expected one of numpy, jax, pallas, torch, triton, got 'nope'",
        ),
        (["conformance", "--level", "nope"], "level: expected one of full, quick, standard, got 'nope'"),
        (
            ["conformance", "--op", OP, "--case", "over_31"],
            "got over_31; try over_2_31",
        ),
        (["conformance", "--plugin", "nope:X"], "expected an importable MODULE:OBJECT, got 'nope:X'"),
        (["conformance", "--plugin", "math:pi"], "math:pi is not a polyfuse.dispatch.Backend but float"),
        (["conformance", "--device", "nope"], "--device: expected a device of this machine, such as cpu, got 'nope'"),
        (["conformance", "--backend", "numpy", "--device", "nope"], "--device: expected a device of this machine"),
        (["conformance", "--backend", "jax", "--device", "tpu"], "got 'tpu' (jax: "),
        (["conformance", "--device", "hpu"], "got 'hpu' (torch: "),
        (["explain", OP, "--device", "nope"], "--device: expected a device of this machine"),
        (["bench", "--device", "nope"], "--device: expected a device of this machine"),
        (["bench", "host", "--device", "nope"], "--device: expected a device of this machine"),
        (["bench", "host", "--op", "nope"], f"op: expected one of {OP}"),
        (["bench", "--model", "nope"], "--model: expected one of qwen3"),
        (["warmup", "--model", "nope"], "warmup: model: expected one of qwen3"),
        (["warmup", "--model", "qwen3_vl_8b", "--device", "nope"], "warmup: device: expected a device of this machine"),
        (["warmup", "--model", "qwen3_vl_8b", "--op", "nope"], f"op: expected one of {OP}"),
        (
            ["warmup", "--model", "qwen3_vl_8b", "--device", "cpu"],
            "warmup: device: expected an accelerator: on a CPU nothing is compiled, and Triton kernels are interpreted",
        ),
        (["bench", "encoder", "--model", "nope"], "'nope' is not one of 'qwen3_vl', 'qwen3_5', 'qwen2_5_vl', 'siglip'"),
        (["bench", "encoder", "--part", "nope"], "'nope' is not one of 'tower', 'trace'"),
        (["bench", "encoder", "--policy", "nope"], "'nope' is not one of 'greedy', 'optimal'"),
        (["bench", "encoder", "--trace", "nope"], "File 'nope' does not exist"),
        (["bench", "encoder", "--trace", __file__], "load_trace: path: expected a JSON file"),
        (["bench", "encoder", "--data-parallel"], "--data-parallel: expected a process started by torchrun, got none"),
        (["soak", "encoder", "--batches", "0"], "0 is not in the range x>=1"),
        (["soak", "encoder", "--model", "nope"], "'nope' is not one of 'qwen3_vl'"),
    ],
)
def test_errors_are_one_line_and_status_2(args, message):
    result = invoke(*args)
    assert result.exit_code == 2
    errors = [x for x in result.output.splitlines() if x.startswith("Error:")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "polyfuse.cli._demo", None)
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.delitem(sys.modules, "polyfuse.cli._demo")
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    result = invoke("demo", "--fast")
    assert result.exit_code == 2
    assert "skimage is not installed" in result.output
    assert "pip install 'polyfuse[transformers]'" in result.output


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("explain gated_rms_norm", "torch"),
        ("explain gated_rms_norm --family jax", "jax"),
        ("demo --fast", "transformers"),
        ("bench", "torch"),
        ("bench host", "torch"),
        ("bench encoder", "torch"),
        ("bench model", "torch"),
        ("soak encoder", "torch"),
        ("tune", "torch"),
        ("warmup --model qwen3_vl_8b", "torch"),
        ("conformance --device cuda", "torch"),
    ],
)
def test_a_command_without_its_extra_says_what_to_install(command, extra):
    """In a process of its own whose only packages are the base dependencies."""
    hide = (
        "import importlib.util as u, sys; f = u.find_spec; gone = 'torch', 'triton', 'jax', 'transformers', 'skimage'\n"
    )
    hide += "u.find_spec = lambda name, *a: None if name in gone else f(name, *a)\n"
    hide += "sys.modules.update(dict.fromkeys(gone))\n"
    code = f"{hide}from polyfuse.cli import main; main({command.split()!r}, prog_name='polyfuse')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"pip install 'polyfuse[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_config_file_is_one_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("backnd: torch\n")
    result = invoke("explain", OP, env={"POLYFUSE_CONFIG": str(path)})
    assert result.exit_code == 2
    assert f"Error: {path}: line 1: backnd: unknown key; did you mean backend?" in result.output


def test_conformance_writes_its_report(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/polyfuse", "conformance", "--op", OP])
    result = invoke(
        "conformance", "--op", OP, "--backend", "numpy", "--level", "quick", "--report", str(tmp_path / "r")
    )
    assert result.exit_code == 0, result.output
    assert "0 failed" in result.output
    assert "numpy: 1 of 1 ops conformant" in result.output
    data = json.loads((tmp_path / "r" / "conformance.json").read_text())
    assert data["ok"] is True
    assert data["counts"]["passed"] > 10
    assert data["command"] == f"polyfuse conformance --op {OP}"
    assert data["spec_versions"] == {OP: OPS[OP].version}
    assert data["backends"]["numpy"]["claims"][OP]["missing"] is None
    assert data["checks"].keys() >= {"values"}


def test_conformance_of_one_case_in_this_process(tmp_path):
    result = invoke("conformance", "--op", OP, "--backend", "numpy", "--case", "over_2_31", "-j", "0")
    assert result.exit_code == 1
    assert "more output elements than the 8000000 that the level runs" in result.output
    result = invoke("conformance", "--op", OP, "--backend", "numpy", "--case", "upsample-*-corners", "-j", "0")
    assert result.exit_code == 0, result.output
    assert "partial pos_embed_interpolate numpy: a filter chose the cases" in result.output
    assert "numpy: 0 of 1 ops conformant" in result.output


def test_ops_prints_the_page_of_an_op():
    assert "v1" in invoke("ops").output
    page = invoke("ops", OP).output
    assert page.startswith(f"# `{OP}`")
    assert "source = i * (s - 1) / (n - 1)" in page


def test_info_fits_80_columns_and_says_the_same_as_json():
    lines = invoke("info").output.splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = [line.split() for line in lines if line.split()[:1] == [OP]]
    (names,) = [line.split() for line in lines if line.split()[:2] == ["numpy", "jax"]]
    words = {"available": "yes", "interpreted": "interpreted", "not_implemented": "-"}
    backends = json.loads(invoke("info", "--json").output)["backends"]
    for backend in backends:
        assert row[1 + names.index(backend["name"])] == words[backend["ops"][OP]["status"]]
    assert {"numpy", "jax", "pallas", "torch", "triton"} <= {backend["name"] for backend in backends}


def test_doctor_says_what_is_there_what_runs_and_what_to_install(monkeypatch):
    said = invoke("doctor", env={"POLYFUSE_STRICT": "0"}).output
    for line in (
        f"  torch: {len(OPS)} of {len(OPS)} ops for torch arrays; a call of silu_mul_block_quant ran",
        "  POLYFUSE_STRICT=0",
    ):
        assert line in said.splitlines()
    assert "  nothing: every extra is there" in said.splitlines()
    found = importlib.util.find_spec
    monkeypatch.setattr("polyfuse.cli.doctor.find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert "  matplotlib is not installed: pip install 'polyfuse[plots]'" in invoke("doctor").output.splitlines()
    compiler = "  torch.compile finds no C++ compiler, which it needs on a CPU: install one, such as g++."
    for there in (None, "/usr/bin/g++"):
        monkeypatch.setattr("polyfuse.cli.doctor.which", lambda name, there=there: there)
        lines = invoke("doctor").output.splitlines()
        assert (compiler in lines) == (there is None and any("interpreted on a CPU" in line for line in lines))


def test_doctor_without_torch_and_jax(monkeypatch):
    found = importlib.util.find_spec
    gone = ("torch", "triton", "jax")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name in gone else found(name, *args))
    monkeypatch.setattr("polyfuse.cli.doctor.find_spec", importlib.util.find_spec)
    lines = invoke("doctor").output.splitlines()
    assert "  cpu, for NumPy arrays alone: neither torch nor JAX is installed" in lines
    for name in gone:
        assert f"  {name} is not installed: pip install 'polyfuse[{name}]'" in lines
    assert not any("interpreted" in line for line in lines)


def test_the_self_test_of_one_op():
    result = invoke("conformance", "--self-test", "--op", "gated_rms_norm")
    assert result.exit_code == 0, result.output
    assert "gated_rms_norm: values: 33 of 33 wrong formulas rejected" in result.output
    assert "gated_rms_norm: strides: 4 of 4 planted defects rejected" in result.output
    assert "survives" not in result.output
