"""No call of a model that Polyfuse knows falls through: the first backend of its platform runs it."""

from pathlib import Path

import pytest
from click.testing import CliRunner

import polyfuse.configs
from polyfuse.bench import ops
from polyfuse.bench.cases import bench_cases
from polyfuse.bench.declined import FAMILIES, Declined, declined
from polyfuse.cli import main
from polyfuse.conformance import Case
from polyfuse.conformance.inputs import described
from polyfuse.dispatch import Device
from polyfuse.spec import OPS, Call, Capability, Deferral, bind
from polyfuse.triton_impl import segment_attention, silu_mul_block_quant

PLATFORMS = sorted(path.stem for path in (Path(polyfuse.configs.__file__).parent / "platforms").glob("*.yaml"))
ARCHES = {"cuda": ((8, 0), (8, 9), (9, 0), (10, 0)), "rocm": ((9, 4),)}
ON = [(kind, arch) for kind in PLATFORMS for arch in ARCHES.get(kind, (None,))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "arch"), ON, ids=str)
def test_the_first_choice_declines_no_call_of_a_model(kind: str, arch: tuple[int, int] | None, family: str) -> None:
    assert [str(found) for found in declined(Device(kind, arch), family)] == []


def test_a_declined_call_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By each thing that a capability restricts, in words, and of the model that is asked for."""
    restricted = Capability(devices=("cuda",), multiples={"D": 4096}, min_arch={"cuda": (9, 0)})
    monkeypatch.setattr(silu_mul_block_quant, "CAPABILITY", restricted)
    found = list(declined(Device("cuda", (9, 0)), model="qwen3_5_35b_a3b"))
    assert [x.case for x in found] == [x.name for x in bench_cases(["silu_mul_block_quant"], "qwen3_5_35b_a3b")]
    assert found[1] == Declined(
        "silu_mul_block_quant",
        "qwen3_5_35b_a3b",
        "T16384_D768",
        "triton",
        restricted.refusal(call(768), "cuda", (9, 0)),
    )
    assert [str(x) for x in declined(Device("cuda", (9, 0)), model="qwen3_vl_8b")] == []
    assert {x.case for x in declined(Device("cuda", (8, 0)), model="qwen3_vl_8b")} == {"T1", "T64", "T16384"}


def test_a_call_left_to_another_backend_is_not_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = Capability(devices=("cuda",), defers=(Deferral("cuda", "it is faster", {"dim": 8}),))
    monkeypatch.setattr(segment_attention, "CAPABILITY", claim)
    assert list(declined(Device("cuda", (9, 0)))) == []
    monkeypatch.setattr(segment_attention, "CAPABILITY", Capability(devices=("rocm",)))
    assert {x.op for x in declined(Device("cuda", (9, 0)))} == {"segment_attention"}


def call(columns: int) -> Call:
    spec = OPS["silu_mul_block_quant"]
    return bind(spec, described(spec, Case("", {"...": (1,), "D": columns}, dtypes={"x": "bfloat16"})))


@pytest.mark.parametrize(("devices", "told"), [(("cuda",), True), (("*",), False)])
def test_the_bench_tells_it(devices: tuple[str, ...], told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU: PyTorch comes first there."""
    from polyfuse.torch_impl import silu_mul_block_quant as first

    monkeypatch.setattr(ops, "run_bench", lambda *_, **__: ops.Bench("cpu", 1.0))
    monkeypatch.setattr(first, "CAPABILITY", Capability(devices=devices))
    asked = ["bench", "--device", "cpu", "--model", "qwen3_vl_8b", "--op", "silu_mul_block_quant"]
    lines = CliRunner().invoke(main, asked).output.splitlines()
    cases = [f"falls through on cpu: silu_mul_block_quant {case} of qwen3_vl_8b: torch: device=cpu: runs on cuda"
             for case in ("T1", "T64", "T16384")]  # fmt: skip
    assert [line for line in lines if "falls through" in line] == (
        cases if told else ["no case falls through: the first backend for cpu declines none"]
    )
