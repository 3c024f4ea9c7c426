"""The MLPs of Transformers' FP8 models on `silu_mul_block_quant` and a GEMM that takes quantised input."""

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from polyfuse.integrations.transformers import _patch
from polyfuse.integrations.transformers._gated_mlp import is_gated, projections
from polyfuse.integrations.transformers._plain import oddity
from polyfuse.runtime.quantized.activation import QuantizedFormat, silu_mul_block_quantized
from polyfuse.runtime.quantized.gemm import ALIGNED, BLOCK, block_scaled_mm, gemm_for

# By class name, so that no model's code is imported that is not used.
FP8_LINEAR = "transformers.integrations.finegrained_fp8.FP8Linear"


DOWN_FORMAT = QuantizedFormat(scale_layout="col_major")


def fp8_mlps(model: nn.Module) -> dict[str, nn.Module]:
    """Every MLP in a model, itself included, that `fuse` fits or has already patched, by its name in the model.

    Not the name of its class tells, but what its `forward` computes: traced, `is_gated` is true of it. Every projection
    is an FP8Linear with blocks of 128 x 128, float32 scales, dynamic activation scales and no bias. What has another
    `forward` put in its place, or has a child with one or with hooks, is left out.
    """
    return {name: module for name, module in model.named_modules() if is_fused(module) or _fits(module)}


def is_fused(module: nn.Module) -> bool:
    """Whether `forward` stands in for an MLP's own."""
    return _patch.is_installed(module, forward)


def fuse(module: nn.Module, name: str, by_request: bool) -> str:
    """Put `forward` in the place of an MLP's own, or say why not. Copies of it keep it, pickles have their own."""
    # A method, because torch.compile compiles modules anew whose `forward` is an object of their own.
    _patch.install(module, MethodType(forward, module), name, by_request)
    return ""


@_patch.stand_in
def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of an MLP with FP8 weights: one kernel between its GEMMs where it infers.

    - Gate and up are calls of the model's own FP8 linear function, on the weights where they are.
    - SiLU, product and quantisation are one kernel that rounds where the separate ones do: its result is theirs, bit
      for bit, if theirs divides with correct rounding.
    - Down takes its input quantised, in `block_scaled_mm`: in bfloat16 on Hopper with CUDA 12.9 or later, and on a CPU.
      It sums in an order of its own, so the last bits may differ where the model's function is another GEMM.

    On other devices, under grad, in training and under `torch.compile` the class's own `forward` runs, and for weights
    that are not as `fp8_mlps` says any more.
    """
    reason = "it has other arguments than x" if len(args) != 1 or kwargs else _why_not(module, args[0])
    _patch.count(module, reason)
    return type(module).forward(module, *args, **kwargs) if reason else _fused(module, args[0])


def gemm(module: nn.Module) -> str:
    """What multiplies an MLP's quantised product by its down projection on the device where it is."""
    return gemm_for(next(module.parameters()).device, torch.bfloat16) or "none on this device"


def why_not(module: nn.Module) -> str:
    """What of an MLP itself, as it is now, keeps it from the fused path; "" for nothing."""
    if not _patch.own_class_forward(type(module)):
        return "its class has another forward"
    for name, child in module.named_children():
        if found := oddity(child):
            return f"{name} {found}"
    if not all(map(_is_block_fp8, projections(module))):
        return "its projections are not block-quantised FP8 layers"
    return ""


def _why_not(module: nn.Module, x: torch.Tensor) -> str:
    """Why a call runs the MLP's own forward; "" if the fused path covers it."""
    if torch.compiler.is_compiling():
        return "it is compiled"
    if found := _patch.not_inference(module, x.device):
        return found
    if not x.numel():
        return "x is empty"
    if not gemm_for(x.device, x.dtype):
        return f"no block-scaled GEMM for {x.dtype} on {x.device.type}"
    return why_not(module)


def _fused(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The MLP's result for x [..., K], in its dtype."""
    from transformers.integrations import finegrained_fp8

    *first, down = projections(module)
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count % ALIGNED:
        rows = pad(rows, (0, 0, 0, -count % ALIGNED))
    gate, *up = (
        finegrained_fp8.fp8_linear(
            rows,
            linear.weight,
            linear.weight_scale_inv,
            block_size=linear.block_size,
            allow_deepgemm=not linear._deepgemm_disabled,
        )
        for linear in first
    )
    product = silu_mul_block_quantized(gate, DOWN_FORMAT, up=up[0] if up else None, scale_min=0.0, materialize=True)
    out = block_scaled_mm(product, down.weight, down.weight_scale_inv, x.dtype)
    return out[:count].view(*x.shape[:-1], -1)


def _fits(module: nn.Module) -> bool:
    """Whether a module is an MLP that `forward` can stand in for, as `fp8_mlps` says."""
    if not projections(module) or why_not(module) or not _patch.own_forward(module, within_hooks=True):
        return False
    return is_gated(module)


def _is_block_fp8(linear: Any) -> bool:
    """Whether a projection is an FP8Linear with blocks, scales and sizes that `block_scaled_mm` takes."""
    if f"{type(linear).__module__}.{type(linear).__qualname__}" != FP8_LINEAR:
        return False
    return (
        linear.block_size is not None
        and tuple(linear.block_size) == (BLOCK, BLOCK)
        and linear.activation_scheme == "dynamic"
        and linear.bias is None
        and linear.weight.dtype == torch.float8_e4m3fn
        and linear.weight_scale_inv.dtype == torch.float32
        and not any(size % BLOCK for size in linear.weight.shape)
    )
