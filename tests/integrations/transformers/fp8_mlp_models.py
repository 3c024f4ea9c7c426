"""MLPs with FP8 weights, and Transformers' FP8 linear function.

Transformers takes its FP8 GEMM from the hub, so its function is emulated here: its quantisation as written, and sums in
float64, where those of a block are exact, or PyTorch's `scaled_mm` on a GPU.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import ScalingType, scaled_mm
from transformers.integrations import finegrained_fp8
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from polyfuse.integrations.transformers._fp8_mlp import fuse

HIDDEN, INTERMEDIATE = 256, 640
FP8 = torch.float8_e4m3fn


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [rows, K] and its scales [rows, K / 128], as the model's kernel computes them."""
    groups = x.float().unflatten(-1, (-1, 128))
    amax = groups.abs().amax(-1)
    scale = amax / torch.full_like(amax, 448)
    return (groups / scale.clamp(min=1e-12)[..., None]).clamp(-448, 448).flatten(-2).to(FP8), scale


def emulated_linear(
    input: Any,
    weight: Any,
    weight_scale_inv: Any,
    block_size: Any = None,
    bias: Any = None,
    activation_scale: Any = None,
    allow_deepgemm: bool = True,
) -> Any:
    """`fp8_linear` of Transformers; raises `AssertionError` for arguments that it is not made for."""
    if tuple(block_size) != (128, 128) or bias is not None or activation_scale is not None:
        raise AssertionError(f"block_size {block_size}, bias {bias}, activation_scale {activation_scale}")
    q, scale = quantised(input.reshape(-1, input.shape[-1]))
    if input.is_cuda:
        q, scale = (nn.functional.pad(t.view(torch.uint8), (0, 0, 0, -len(t) % 4)).view(t.dtype) for t in (q, scale))
        scale = scale.t().contiguous().t()
        blocks = nn.functional.pad(weight_scale_inv, (0, -weight_scale_inv.shape[1] % 4)).t()
        recipes = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
        out = scaled_mm(q, weight.t(), scale, recipes[0], blocks, recipes[1], output_dtype=input.dtype)
        return out[: input.numel() // input.shape[-1]].view(*input.shape[:-1], len(weight))
    out = torch.zeros(len(q), len(weight))
    for k in range(scale.shape[1]):
        for n in range(0, len(weight), 128):
            part, block = (t[:, 128 * k : 128 * (k + 1)].double() for t in (q, weight[n : n + 128]))
            out[:, n : n + 128] += (part @ block.t()).float() * scale[:, k : k + 1] * weight_scale_inv[n // 128, k]
    return out.to(input.dtype).view(*input.shape[:-1], len(weight))


def build(cls: type[nn.Module] = Qwen3MLP, device: str = "cpu", **options: Any) -> Any:
    """An MLP with FP8 weights."""
    config = SimpleNamespace(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, hidden_act="silu", mlp_bias=False)
    mlp: Any = cls(config, INTERMEDIATE) if "Qwen3_5" in cls.__name__ else cls(config)
    generator = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {"block_size": (128, 128)} | options
    for name, linear in list(mlp.named_children()):
        if isinstance(linear, nn.Linear):
            fp8 = finegrained_fp8.FP8Linear(linear.in_features, linear.out_features, **settings)
            for parameter in fp8.parameters():
                parameter.requires_grad_(False)
            values = torch.randn(fp8.weight.shape, generator=generator) * 100
            fp8.weight.copy_(values.clamp(-448, 448).to(FP8))  # past 464 PyTorch 2.11 gives NaN
            fp8.weight_scale_inv.copy_(torch.rand(fp8.weight_scale_inv.shape, generator=generator) * 1e-3)
            setattr(mlp, name, fp8)
    return mlp.eval().to(device)


def patched(mlp: Any) -> Any:
    """The MLP, fused."""
    fuse(mlp, "mlp", by_request=False)
    return mlp


def sample(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> torch.Tensor:
    """Hidden states [*shape, HIDDEN]."""
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def run(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = mlp(x)
    return out


def hooked(mlp: Any) -> None:
    mlp.act_fn.register_forward_hook(lambda *_: None)


def kernelized(mlp: Any) -> None:
    forward = mlp.down_proj.forward
    mlp.down_proj.forward = lambda x: forward(x)


def in_float32(mlp: Any) -> None:
    for name, linear in list(mlp.named_children()):
        if name != "act_fn":
            plain = nn.Linear(linear.in_features, linear.out_features, bias=False)
            setattr(mlp, name, plain)
