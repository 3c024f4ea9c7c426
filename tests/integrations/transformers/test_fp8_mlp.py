"""FP8 MLPs: fused bit for bit, and left alone where they cannot be."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

pytest.importorskip("transformers")

from torch._dynamo.testing import CompileCounterWithBackend
from transformers.integrations import finegrained_fp8
from transformers.models.glm4.modeling_glm4 import Glm4MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5MLP
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeMLP
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextMLP

from polyfuse.integrations.transformers import report, restore
from polyfuse.integrations.transformers._fp8_mlp import fp8_mlps, is_fused
from tests.integrations.transformers.fp8_mlp_models import (
    HIDDEN,
    INTERMEDIATE,
    build,
    hooked,
    in_float32,
    kernelized,
    patched,
    run,
    sample,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # Inductor's own
    pytest.mark.usefixtures("fp8_calls"),
]

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"))]
FAMILIES = [Qwen3MLP, Qwen3NextMLP, Qwen3_5MLP, Qwen3_5MoeMLP, LlamaMLP, Phi3MLP, Glm4MLP]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cls", FAMILIES)
def test_bitwise_equal_to_the_model(cls: type[nn.Module], device: str, fp8_calls: list[int]) -> None:
    mlp, x = build(cls, device), sample(3, 5, device=device)
    want = run(mlp, x)
    assert want.abs().amax() > 1
    fp8_calls.clear()
    got = run(patched(mlp), x)
    assert torch.equal(got, want)
    (part,) = report(mlp).parts
    assert part.gemm == ("written-out products on the CPU" if device == "cpu" else "torch.nn.functional.scaled_mm")
    assert (got.dtype, got.shape) == (x.dtype, (3, 5, HIDDEN))
    assert fp8_calls == ([2 * INTERMEDIATE] if hasattr(mlp, "gate_up_proj") else [INTERMEDIATE, INTERMEDIATE])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1,), (4,), (2, 1, 3)])
def test_other_dtypes_and_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    mlp, x = build(), sample(*shape, dtype=dtype)
    want = run(mlp, x)
    with torch.inference_mode():
        assert torch.equal(patched(mlp)(x), want)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e-6, 1e-12])
def test_small_activations_have_no_floor(size: float) -> None:
    """The scales of `silu_mul_block_quant` end at 4e-6 by default: most of these products would be lost."""
    mlp, x = build(), sample(8) * size
    want = run(mlp, x)
    assert torch.equal(run(patched(mlp), x), want)
    assert want.count_nonzero() == (size > 1e-12) * want.numel()


def test_nan_and_infinity_stay_in_their_rows() -> None:
    mlp, x = build(), sample(6)
    x[1, 3], x[4, 7] = float("nan"), float("inf")
    want = run(mlp, x)
    torch.testing.assert_close(run(patched(mlp), x), want, rtol=0, atol=0, equal_nan=True)
    assert want.isfinite().all(-1).tolist() == [True, False, True, True, False, True]


def test_weights_stay_where_they_are(tmp_path: Path) -> None:
    mlp = build()
    before = {name: (p, p.data_ptr()) for name, p in mlp.named_parameters()}
    run(patched(mlp), sample(2))
    assert {name: (p, p.data_ptr()) for name, p in mlp.named_parameters()} == before
    assert list(mlp.state_dict()) == list(before)
    save_model(mlp, str(tmp_path / "mlp.safetensors"))  # refuses parameters that share memory


def replaced(mlp: Any) -> None:
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.roll(1, 0).clone(), requires_grad=False)


def assigned(mlp: Any) -> None:
    mlp.load_state_dict({name: p.roll(1, 0).clone() for name, p in mlp.state_dict().items()}, assign=True)


def written(mlp: Any) -> None:
    with torch.no_grad():
        mlp.gate_proj.weight_scale_inv.mul_(2)
        mlp.down_proj.weight.copy_(mlp.down_proj.weight.roll(1, 0))


@pytest.mark.parametrize("change", [replaced, assigned, written])
def test_changed_weights_are_followed(change: Callable[[Any], None]) -> None:
    plain, mlp, x = build(), patched(build()), sample(4)
    before = run(mlp, x)
    change(plain)
    change(mlp)
    assert torch.equal(run(mlp, x), run(plain, x))
    assert not torch.equal(run(plain, x), before)


def test_a_deep_copy_keeps_the_patch(fp8_calls: list[int]) -> None:
    mlp, x = patched(build()), sample(2)
    want = run(mlp, x)
    other = copy.deepcopy(mlp)
    assert other.forward.__self__ is other
    assert list(fp8_mlps(other).values()) == [other]
    written(mlp)
    fp8_calls.clear()
    assert torch.equal(run(other, x), want)
    assert fp8_calls == [INTERMEDIATE, INTERMEDIATE]


def test_a_saved_module_is_plain_and_can_be_patched(fp8_calls: list[int]) -> None:
    mlp, x = patched(build()), sample(2)
    want = run(mlp, x)
    file = io.BytesIO()
    torch.save(mlp, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert not is_fused(other)
    assert list(fp8_mlps(other).values()) == [other]
    fp8_calls.clear()
    assert torch.equal(run(other, x), want)
    assert torch.equal(run(patched(other), x), want)
    assert fp8_calls == [INTERMEDIATE, INTERMEDIATE, HIDDEN, INTERMEDIATE, INTERMEDIATE]


def test_a_released_module_is_as_before(fp8_calls: list[int]) -> None:
    mlp, x = build(), sample(2)
    attributes = set(vars(mlp))
    want = run(patched(mlp), x)
    restore(mlp)
    assert set(vars(mlp)) == attributes
    fp8_calls.clear()
    assert torch.equal(run(mlp, x), want)
    assert fp8_calls == [INTERMEDIATE, INTERMEDIATE, HIDDEN]


@pytest.mark.parametrize("change", [hooked, kernelized, in_float32, lambda mlp: mlp.train()])
def test_the_original_runs_where_the_fused_one_cannot(change: Callable[[Any], Any], fp8_calls: list[int]) -> None:
    plain, mlp, x = build(), patched(build()), sample(2, dtype=torch.float32)
    want = run(plain, x)
    run(mlp, x)
    fp8_calls.clear()
    change(mlp)
    got = run(mlp, x)
    if change is in_float32:
        assert fp8_calls == []
    else:
        assert torch.equal(got, want)
        assert fp8_calls == [INTERMEDIATE, INTERMEDIATE, HIDDEN]


def test_the_original_runs_under_grad_by_keyword_and_on_no_rows(fp8_calls: list[int]) -> None:
    mlp, x = patched(build()), sample(2)
    assert torch.equal(mlp(x), run(build(), x))
    fp8_calls.clear()
    with torch.no_grad():
        mlp(x=x)
        assert mlp(x[:0]).shape == (0, HIDDEN)
    assert fp8_calls == [INTERMEDIATE, INTERMEDIATE, HIDDEN] * 2


def test_the_original_is_compiled(fp8_calls: list[int]) -> None:
    mlp, x = patched(build()), sample(4)
    want = run(mlp, x)
    fp8_calls.clear()
    assert torch.equal(run(torch.compile(mlp, backend="eager", fullgraph=True), x), want)
    assert fp8_calls == [INTERMEDIATE, INTERMEDIATE, HIDDEN]


def test_ten_compiled_mlps_share_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(input: torch.Tensor, weight: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return input @ weight.to(input.dtype).t()

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", linear)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda mlp, x: mlp(x), fullgraph=True, backend=counter)
    mlp, x = build(), sample(4, dtype=torch.float32)
    for _ in range(10):
        mlp = patched(copy.deepcopy(mlp))
        replaced(mlp)
        with torch.no_grad():
            assert torch.equal(compiled(mlp, x), type(mlp).forward(mlp, x))
    assert counter.frame_count == 1
