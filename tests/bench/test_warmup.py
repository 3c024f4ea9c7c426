"""What a model's calls need is compiled before they come, and it is told what that was."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import polyfuse
from polyfuse.bench import warmup
from polyfuse.bench.warmup import Kernel, Warmup, _noted
from polyfuse.cli import main
from polyfuse.spec import SpecError

ROOT = Path(__file__).parents[2]
OPS = ("pos_embed_interpolate", "silu_mul_block_quant")


def warmed(cache: Path) -> list[str]:
    """The lines that a process without an interpreter prints, after compiling for a GPU that is not there."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.bench.warmed", "qwen3_vl_8b", *OPS]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_kernels_of_a_models_calls_are_compiled_once_and_then_cached(tmp_path: Path) -> None:
    """11 calls of two ops need 7 forms of two kernels; the next process finds all of them."""
    calls, *kernels = warmed(tmp_path)
    assert calls == "11"
    assert sorted(kernels) == [
        *["triton_impl.pos_embed_interpolate _kernel compiled"] * 5,
        *["triton_impl.silu_mul_block_quant _kernel compiled"] * 2,
    ]
    again = warmed(tmp_path)[1:]
    assert sorted(again) == [line.replace("compiled", "cached") for line in sorted(kernels)]


def test_what_listened_before_still_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    heard = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", before := lambda **told: heard.append(told))
    kernels: list[Kernel] = []
    source = SimpleNamespace(name="_kernel", fn=SimpleNamespace(fn=warmup.compile_calls))
    told = {"src": source, "metadata": {}, "metadata_group": {}, "times": SimpleNamespace(total=2_500_000)}
    with _noted(kernels):
        triton.knobs.compilation.listener(**told, cache_hit=False)
    assert kernels == [Kernel("bench.warmup", "_kernel", 2.5, False)]
    assert heard == [{**told, "cache_hit": False}]
    assert triton.knobs.compilation.listener is before


def test_ops_that_the_model_does_not_call() -> None:
    expected = r"^warmup: ops: expected some of pos_embed_interpolate, .* which qwen3_vl_8b calls, got gdn_decode$"
    with pytest.raises(SpecError, match=expected):
        polyfuse.warmup("qwen3_vl_8b", ops=["gdn_decode"])


def test_the_command_shows_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def fake(*given: object, **options: object) -> Warmup:
        asked.append((given, options))
        kernels = [Kernel("triton_impl.gdn_decode", "_kernel", 3.25, False), Kernel("fla", "_scan", 0.5, True)]
        return Warmup("NVIDIA H200", "qwen3_next_80b", 40, 2.0, kernels)

    monkeypatch.setattr(warmup, "warmup", fake)
    command = ["warmup", "--model", "qwen3_next_80b", "--op", "gdn_decode", "--device", "cuda", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert asked == [(("qwen3_next_80b", "cuda"), {"ops": ("gdn_decode",), "workers": warmup.WORKERS})]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines()]
    assert ["_kernel", "triton_impl.gdn_decode", "3.25", "compiled"] in cells
    assert ["_scan", "fla", "0.50", "from Triton's cache"] in cells
    assert "40 calls in 2.0 s; compilers took 3.8 s in 8 threads" in result.output
    assert json.loads((tmp_path / "warmup_qwen3_next_80b_h200.json").read_text())["kernels"][1]["cached"] is True


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nothing is compiled on a CPU")
def test_first_calls_on_a_gpu_are_the_calls_of_the_model() -> None:
    result = polyfuse.warmup("qwen3_vl_8b", "cuda")
    assert result.calls == 12
    assert {kernel.module for kernel in result.kernels} <= {
        "triton_impl.pos_embed_interpolate",
        "triton_impl.silu_mul_block_quant",
        "triton_impl.segment_attention",
    }
