"""The examples run as a user runs them, each in a process of its own, and say what they should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SAYS = {
    "quickstart": ("q torch.float8_e4m3fn (4, 512) scale (4, 4)", "('silu_mul_block_quant', 'triton'): 1"),
    "jax_sharded": ("8 devices hold (16, 512) of (128, 512)", "equal to one device: True"),
    "fp8_mlp_compiled": ("equal to the last bit: True", "fused calls: 1"),
    "accelerate_qwen3_vl": ("grids [[1, 32, 32], [1, 24, 38]] features (484, 64)", "no graphs on cpu"),
    "accelerate_qwen3_5": ("the same tokens as untouched: True", "model.layers.2.linear_attn"),
}
SLOW = {"fp8_mlp_compiled", "accelerate_qwen3_vl", "accelerate_qwen3_5"}
OTHERS = {"serve_gdn_layer"}  # tests/test_example_serve.py


def run(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an example on the CPU, with no settings but those given."""
    variables = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "TRITON_INTERPRET")}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "COLUMNS": "120"} | environment
    command = [sys.executable, str(ROOT / f"examples/{name}.py")]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SAYS])
def test_it_runs(name: str) -> None:
    done = run(name)
    assert done.returncode == 0, done.stderr
    for text in SAYS[name]:
        assert text in done.stdout


@pytest.mark.slow
def test_the_log_tells_what_accelerate_did() -> None:
    log = run("accelerate_qwen3_5", POLYFUSE_LOG="debug").stderr.splitlines()
    name = "model.layers.0.linear_attn"
    assert f"polyfuse DEBUG: accelerate: {name}, gated_delta_net: patched" in log
    assert log.count(f"polyfuse DEBUG: {name}: first fused call") == 1


def test_every_example_is_tested() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(SAYS) | OTHERS
