"""MLPs with torchao's MXFP8, MXFP4 and NVFP4 weights: fused as torchao computes them, or left alone with a reason."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

pytest.importorskip("transformers")

from torchao.prototype.mx_formats import mx_tensor
from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference
from transformers import Qwen3Config, Qwen3ForCausalLM, TorchAoConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

import polyfuse
from polyfuse.integrations.transformers import _torchao_mlp, accelerate, report, restore
from tests.integrations.transformers.torchao_models import (
    HIDDEN,
    MXFP4,
    MXFP8,
    build,
    mx,
    nvfp4,
    part_of,
    plain,
    recorded,
    run,
    sample,
    scaled,
)

FORMATS = [MXFP8, MXFP4]
FACTOR = 2.0**-8  # of NVFP4: divisions by a power of two round nothing


@pytest.fixture
def quantisations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of ops, and of torchao's own quantiser, in their order."""
    seen: list[str] = []

    def spied(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            seen.append(name)
            return function(*args, **options)

        return call

    for name in ("block_quant", "silu_mul_block_quant"):
        monkeypatch.setattr(polyfuse, name, spied(name, getattr(polyfuse, name)))
    monkeypatch.setattr(mx_tensor, "to_mx", spied("torchao", mx_tensor.to_mx))
    return seen


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What PyTorch's scaled GEMM is given, on a CPU that has one."""
    calls: list[Any] = []
    monkeypatch.setattr(torch, "_scaled_mm", recorded(calls))
    monkeypatch.setattr(_torchao_mlp, "gemm_of", lambda weight: "a stand-in")
    return calls


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("cls", [Qwen3MLP, LlamaMLP, Phi3MLP])
def test_bitwise_equal_to_torchao(cls: type[nn.Module], dtype: torch.dtype, quantisations: list[str]) -> None:
    mlp, x = mx(build(cls), dtype), sample(3, 43)
    want = run(mlp, x)
    assert want.abs().amax() > 1
    accelerate(mlp)
    quantisations.clear()
    got = run(mlp, x)
    assert torch.equal(got, want)
    assert (got.dtype, got.shape) == (torch.bfloat16, (3, 43, HIDDEN))
    assert quantisations == ["block_quant", "silu_mul_block_quant"]
    part = part_of(mlp)
    assert (part.kind, part.fused, part.fused_calls, part.gemm) == ("torchao_mlp", True, 1, "torchao's emulated GEMM")
    with torch.inference_mode():
        assert torch.equal(mlp(x), want)


def written_out(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """An MLP in MXFP8, step by step: exponents rounded up by `frexp`, and products of dequantised matrices."""

    def quantised(y: torch.Tensor) -> torch.Tensor:
        groups = y.float().unflatten(-1, (-1, 32))
        mantissa, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True) / torch.tensor(448.0))
        scale = torch.exp2((exponent - (mantissa == 0.5).int()).float())
        return ((groups / scale).to(MXFP8).float() * scale).flatten(-2).bfloat16()

    def linear(y: torch.Tensor, weight: Any) -> torch.Tensor:
        group = weight.qdata.shape[1] // 32
        scale = plain(weight.scale, len(weight), group).repeat_interleave(32, dim=1)
        return quantised(y) @ (weight.qdata.double() * scale).bfloat16().t()

    gate, up = linear(x, mlp.gate_proj.weight), linear(x, mlp.up_proj.weight)
    return linear(silu(gate) * up, mlp.down_proj.weight)


def test_bitwise_equal_to_the_same_arithmetic_written_out() -> None:
    mlp, x = accelerate(mx(build())), sample(130)
    assert torch.equal(run(mlp, x), written_out(mlp, x))
    assert part_of(mlp).fused_calls == 1


@pytest.mark.parametrize("size", [0.0, 2.0**-50, 1e-6, 1e15])
def test_any_size_of_activation(size: float) -> None:
    mlp, x = mx(build()), sample(4) * size
    want = run(mlp, x)
    assert torch.equal(run(accelerate(mlp), x), want)
    assert want.count_nonzero() == (size > 0) * want.numel()


def test_nan_stays_in_its_row() -> None:
    mlp, x = mx(build()), sample(4)
    x[1, 3] = float("nan")
    want = run(mlp, x)
    torch.testing.assert_close(run(accelerate(mlp), x), want, rtol=0, atol=0, equal_nan=True)
    assert want.isfinite().all(-1).tolist() == [True, False, True, True]


def test_mxfp8_hands_the_scaled_gemm_what_torchao_does(products: list[Any]) -> None:
    mlp, x = mx(build(), gemm="AUTO"), sample(3, 43)
    want = run(mlp, x)
    own = list(products)
    accelerate(mlp)
    products.clear()
    assert torch.equal(run(mlp, x), want)
    assert len(products) == len(own) == 3
    for ours, theirs in zip(products, own, strict=True):
        assert all(map(torch.equal, ours, theirs))


def written_out_in_nvfp4(mlp: Any, x: torch.Tensor, static: float | None) -> torch.Tensor:
    """An MLP in NVFP4, step by step, by divisions alone."""

    def linear(y: torch.Tensor, weight: Any) -> torch.Tensor:
        factor = torch.tensor(static) if static else y.abs().amax().float() / 2688
        groups = y.float().unflatten(-1, (-1, 16))
        scale = (groups.abs().amax(-1, keepdim=True) / (6 * factor)).clamp(max=448).to(torch.float8_e4m3fn).float()
        ratio = (groups / (scale * factor)).nan_to_num(0)
        steps = torch.where(ratio.abs() < 2, 2, torch.where(ratio.abs() < 4, 1, 0.5))  # in a number of four bits
        q = ((ratio * steps).round() / steps).clamp(-6, 6)
        out = ((q * scale).flatten(-2).double() @ scaled(weight.qdata, weight.scale).t()).bfloat16()
        return out * (factor * weight.per_tensor_scale).bfloat16()

    return linear(silu(linear(x, mlp.gate_proj.weight)) * linear(x, mlp.up_proj.weight), mlp.down_proj.weight)


@pytest.mark.parametrize(
    ("static", "ops"),
    [(FACTOR, ["block_quant", "block_quant", "silu_mul_block_quant"]), (None, ["block_quant", "block_quant"])],
)
def test_nvfp4_is_the_same_arithmetic_written_out(
    static: float | None, ops: list[str], products: list[Any], quantisations: list[str]
) -> None:
    """Static factors are a tensor of their own for each layer; one of the whole product has to wait for it."""
    x = sample(130)
    unquantised = run(build(), x)
    mlp = nvfp4(build(), static)
    torchao = run(mlp, x)
    got = run(accelerate(mlp, parts=["torchao_mlp"]), x)
    assert torch.equal(got, written_out_in_nvfp4(mlp, x, static))
    assert quantisations == ops
    assert len(products) == 6
    assert (got - torchao).norm() < (unquantised - torchao).norm() / 10


def test_layers_with_the_same_static_factor_share_a_quantisation(products: list[Any], quantisations: list[str]) -> None:
    mlp, x = nvfp4(build(), FACTOR), sample(4)
    mlp.up_proj.weight.act_per_tensor_scale = mlp.gate_proj.weight.act_per_tensor_scale
    run(accelerate(mlp, parts=["torchao_mlp"]), x)
    assert quantisations == ["block_quant", "silu_mul_block_quant"]


def test_nvfp4_is_taken_by_name_only(products: list[Any]) -> None:
    mlp, other = nvfp4(build()), mx(build())
    model = accelerate(nn.ModuleDict({"a": mlp, "b": other}))
    nvfp4_part, mx_part = report(model).parts
    assert (nvfp4_part.fused, mx_part.fused) == (False, True)
    assert nvfp4_part.reason == (
        "is NVFP4, which the op rounds in other places than torchao: taken only where `parts` names it"
    )
    accelerate(model, parts=["torchao_mlp"])
    assert [part.fused for part in report(model).parts] == [True, True]


def test_an_mlp_that_changes_runs_its_own(quantisations: list[str]) -> None:
    mlp, x = accelerate(mx(build())), sample(4)
    want = run(mlp, x)
    quantisations.clear()
    hook = mlp.down_proj.register_forward_hook(lambda *_: None)
    assert torch.equal(run(mlp, x), want)
    assert part_of(mlp).unfused_calls == {"down_proj has hooks": 1}
    assert part_of(mlp).reason == "down_proj has hooks"
    assert quantisations == ["torchao"] * 3
    hook.remove()
    assert torch.equal(run(mlp, x), want)
    assert part_of(mlp).fused_calls == 2


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda mlp, x: mlp(x), "gradients are recorded"),
        (lambda mlp, x: run(mlp.train(), x), "the module is in training mode"),
    ],
)
def test_calls_that_run_the_models_own(call: Callable[[Any, Any], torch.Tensor], reason: str) -> None:
    mlp, x = mx(build()), sample(4)
    want = call(copy.deepcopy(mlp), x)
    assert torch.equal(call(accelerate(mlp), x), want)
    assert part_of(mlp).unfused_calls == {reason: 1}


def test_other_dtypes_are_left_to_torchao() -> None:
    """Which has no emulated GEMM of them."""
    mlp = accelerate(mx(build()))
    with pytest.raises(RuntimeError, match="same dtype"):
        run(mlp, sample(4).float())
    reason = "x is a Tensor of torch.float32, and the op is torchao's in bfloat16"
    assert part_of(mlp).unfused_calls == {reason: 1}


def test_the_original_is_compiled(quantisations: list[str]) -> None:
    mlp, x = mx(build()), sample(4)
    want = run(mlp, x)
    accelerate(mlp)
    quantisations.clear()
    assert torch.equal(run(torch.compile(mlp, backend="aot_eager"), x), want)
    assert "block_quant" not in quantisations


def test_restored_it_is_as_before_and_a_copy_stays_patched(quantisations: list[str]) -> None:
    mlp, x = mx(build()), sample(4)
    attributes, weights = set(vars(mlp)), [id(linear.weight) for linear in (mlp.gate_proj, mlp.down_proj)]
    want = run(mlp, x)
    other = copy.deepcopy(accelerate(mlp))
    restore(mlp)
    assert set(vars(mlp)) == attributes
    assert [id(linear.weight) for linear in (mlp.gate_proj, mlp.down_proj)] == weights
    assert part_of(mlp).reason == "not accelerated"
    quantisations.clear()
    assert torch.equal(run(mlp, x), want)
    assert torch.equal(run(other, x), want)
    assert quantisations == ["torchao"] * 3 + ["block_quant", "silu_mul_block_quant"]


def test_a_checkpoint_as_transformers_loads_it(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).bfloat16().save_pretrained(tmp_path / "plain")
    options: Any = {"kernel_preference": KernelPreference.EMULATED}
    config = TorchAoConfig(MXDynamicActivationMXWeightConfig(**options))
    model: Any = Qwen3ForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(tmp_path / "mxfp8")
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "mxfp8", dtype=torch.bfloat16)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        want = model(ids).logits
        accelerate(model)
        got = model(ids).logits
    assert torch.equal(got, want)
    parts = report(model).parts
    assert [(part.name, part.kind, part.fused_calls) for part in parts] == [
        (f"model.layers.{layer}.mlp", "torchao_mlp", 1) for layer in range(2)
    ]
