"""MLPs that torchao has quantised to MXFP8, MXFP4 or NVFP4, and the GEMM of these formats, written out."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig, NVFP4Tensor
from torchao.prototype.mx_formats.nvfp4_tensor import QuantizeTensorToNVFP4Kwargs, per_tensor_amax_to_scale
from torchao.quantization import quantize_
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from polyfuse.integrations.transformers import report

HIDDEN, INTERMEDIATE = 96, 160  # neither fills blocks of 128 rows by 4 scales
MXFP8, MXFP4 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def build(cls: type[nn.Module] = Qwen3MLP, act: str = "silu") -> Any:
    """An MLP in bfloat16."""
    config = SimpleNamespace(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, hidden_act=act, mlp_bias=False)
    torch.manual_seed(0)
    mlp = cls(config)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.2)
    return mlp.bfloat16().eval().requires_grad_(False)


def mx(mlp: Any, dtype: torch.dtype = MXFP8, gemm: str = "EMULATED", **options: Any) -> Any:
    """An MLP with weights, and activations, of an MX format."""
    options |= {"activation_dtype": dtype, "weight_dtype": dtype, "kernel_preference": KernelPreference[gemm]}
    quantize_(mlp, MXDynamicActivationMXWeightConfig(**options))
    return mlp


def nvfp4(mlp: Any, static: float | None = None) -> Any:
    """An MLP in NVFP4. `static` is the factor of all of each activation; None leaves it to the activation."""
    for linear in mlp.children():
        if isinstance(linear, nn.Linear):
            asked = QuantizeTensorToNVFP4Kwargs(16, True, False, static is None)
            weight = NVFP4Tensor.to_nvfp4(
                linear.weight,
                per_tensor_scale=per_tensor_amax_to_scale(linear.weight.abs().amax()),
                act_per_tensor_scale=None if static is None else torch.tensor(static),
                is_swizzled_scales=True,
                act_quant_kwargs=asked,
            )
            linear.weight = nn.Parameter(weight, requires_grad=False)
    return mlp


def sample(*shape: int) -> torch.Tensor:
    """Hidden states [*shape, HIDDEN]."""
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()


def numbers(values: torch.Tensor) -> torch.Tensor:
    """What the bytes [M, K] of float8_e4m3fn stand for, or the pairs [M, K / 2] of four bits; in float64."""
    if values.dtype == MXFP8:
        return values.double()
    code = values.contiguous().view(torch.uint8)
    code = torch.stack([code & 15, code >> 4], dim=-1).flatten(-2).long()
    return (E2M1[code & 7] * (1 - 2 * (code >> 3))).double()


def plain(scales: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The scales [rows, groups], in float64, of an array with the layout swizzled_128x4."""
    r, g = torch.arange(rows)[:, None], torch.arange(groups)
    place = ((r // 128) * (-(-groups // 4)) + g // 4) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + g % 4
    return scales.contiguous().flatten().view(torch.uint8)[place].view(scales.dtype).double()


def scaled(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Numbers [M, K] times the scales of their groups."""
    given = numbers(values)
    group = 16 if scales.dtype == torch.float8_e4m3fn else 32
    return given * plain(scales, len(given), given.shape[1] // group).repeat_interleave(group, dim=1)


def scaled_mm(a: Any, b: Any, scale_a: Any, scale_b: Any, bias: None, out_dtype: Any) -> torch.Tensor:
    """`torch._scaled_mm` of these formats, without a bias: sums in float64, then rounded to `out_dtype`."""
    return (scaled(a, scale_a) @ scaled(b.t(), scale_b).t()).to(out_dtype)


def recorded(calls: list[Any]) -> Callable[..., torch.Tensor]:
    """`scaled_mm`, with the bytes of the activation and of its scales of each call kept."""

    def call(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append((a.view(torch.uint8).clone(), scale_a.flatten().view(torch.uint8).clone()))
        return scaled_mm(a, b, scale_a, *args, **options)

    return call


def run(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = mlp(x)
    return out


def part_of(mlp: Any) -> Any:
    (part,) = report(mlp).parts
    return part
