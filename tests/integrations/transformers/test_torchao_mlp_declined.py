"""MLPs with torchao's weights that are no part: each says why, and is left as it is."""

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
from torchao.quantization import quantize_
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference
from transformers.models.llama.modeling_llama import LlamaMLP

import polyfuse
from polyfuse.integrations.transformers import accelerate
from tests.integrations.transformers.torchao_models import INTERMEDIATE, build, mx, nvfp4, part_of


class Clamped(LlamaMLP):
    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))


def with_bias() -> Any:
    mlp = mx(build())
    mlp.up_proj.bias = nn.Parameter(torch.ones(INTERMEDIATE, dtype=torch.bfloat16), requires_grad=False)
    return mlp


def with_hook() -> Any:
    mlp = mx(build())
    mlp.act_fn.register_forward_hook(lambda *_: None)
    return mlp


def partly() -> Any:
    mlp = build()
    mx(nn.ModuleList([mlp.gate_proj, mlp.up_proj]))
    return mlp


def weights_alone() -> Any:
    mlp = build()
    quantize_(mlp, NVFP4WeightOnlyConfig())
    return mlp


def with_a_forward_of_somebody() -> Any:
    mlp = mx(build())
    own = mlp.forward
    mlp.forward = lambda x: own(x)
    return mlp


def with_a_projection_replaced() -> Any:
    mlp = mx(build())
    mlp.down_proj = nn.Sequential(mlp.down_proj)
    return mlp


def with_blocks(mlp: Any) -> Any:
    mlp.down_proj.weight.act_quant_kwargs.block_size = 16
    return mlp


def with_another_gemm(mlp: Any) -> Any:
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        linear.weight.kernel_preference = linear.weight.act_quant_kwargs.kernel_preference = KernelPreference.TORCH
    return mlp


DECLINED = {
    "gelu": (lambda: mx(build(act="gelu")), "does not compute SiLU"),
    "clamped": (lambda: mx(build(Clamped)), "does not compute SiLU"),
    "bias": (with_bias, "up_proj has a bias"),
    "hook": (with_hook, "act_fn has hooks"),
    "partly": (partly, "down_proj has a weight that is a torch.nn.parameter.Parameter"),
    "weights alone": (weights_alone, "gate_proj has its weight alone quantised"),
    "floor": (lambda: mx(build(), scaling_mode=ScaleCalculationMode.FLOOR), "gate_proj has scales of mode FLOOR"),
    "e5m2": (lambda: mx(build(), torch.float8_e5m2), "gate_proj is for activations of torch.float8_e5m2"),
    "blocks": (lambda: with_blocks(mx(build())), "down_proj has blocks of 16"),
    "gemm": (lambda: with_another_gemm(mx(build())), "gate_proj prefers the GEMM TORCH"),
    "no gemm here": (lambda: mx(build(), gemm="AUTO"), "cpu has no GEMM of this format"),
    "nvfp4 here": (lambda: nvfp4(build()), "cpu has no GEMM of this format"),
    "forward": (with_a_forward_of_somebody, "has another forward"),
    "replaced": (with_a_projection_replaced, "down_proj is a torch.nn.modules.container.Sequential"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_is_declined_says_why_and_stays_as_it_is(name: str) -> None:
    make, reason = DECLINED[name]
    mlp = make()
    attributes = dict(vars(mlp))
    with pytest.raises(polyfuse.SpecError, match=reason):
        accelerate(mlp, parts=["torchao_mlp"])
    assert vars(mlp) == attributes
    part = part_of(mlp)
    assert (part.kind, part.fused) == ("torchao_mlp", False)
    assert reason in part.reason
