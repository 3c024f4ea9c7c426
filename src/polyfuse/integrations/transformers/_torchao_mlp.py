"""Gated MLPs with torchao's MXFP8, MXFP4 or NVFP4 weights on quantising ops, before torchao's own GEMMs."""

from types import MethodType
from typing import Any

import torch
from torch import nn

from polyfuse.integrations.transformers import _patch
from polyfuse.integrations.transformers._gated_mlp import is_gated, projections
from polyfuse.integrations.transformers._plain import oddity
from polyfuse.integrations.transformers._torchao import (
    format_of,
    gemm_of,
    global_scale,
    has_scale_of_all,
    is_nvfp4,
    is_torchao,
    odd_linear,
    product,
)
from polyfuse.runtime.quantized.activation import QuantizedActivation, block_quantized, silu_mul_block_quantized


def torchao_mlps(model: nn.Module) -> dict[str, nn.Module]:
    """Every MLP in a model, itself included, with a projection that torchao has quantised so, by its name in the model.

    Whether one can be fused is for `fuse` to say.
    """
    return {name: module for name, module in model.named_modules() if is_fused(module) or _weights(module)}


def is_fused(module: nn.Module) -> bool:
    """Whether `forward` stands in for an MLP's own."""
    return _patch.is_installed(module, forward)


def fuse(module: nn.Module, name: str, by_request: bool) -> str:
    """Put `forward` in the place of an MLP's own, or say why not."""
    if not _patch.own_forward(module, within_hooks=True):
        return "has another forward"
    if found := why_not(module):
        return found
    if not is_gated(module):
        return "does not compute SiLU(gate) * up"
    if not by_request and any(map(is_nvfp4, _weights(module))):
        return "is NVFP4, which the op rounds in other places than torchao: taken only where `parts` names it"
    _patch.install(module, MethodType(forward, module), name, by_request)
    return ""


@_patch.stand_in
def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of an MLP with torchao's weights: two quantisations, before its three GEMMs, where it infers.

    - x is quantised once for gate and up.
    - SiLU, product and quantisation are one kernel that rounds where the separate ones do. If the scales depend on the
      largest number of the whole product, SiLU and product come first.
    - The GEMMs are torchao's own, on the weights where they are.

    MXFP8 and MXFP4 are then those of torchao bit for bit, for bfloat16 from 2**-118 to infinity, exclusive. Under grad,
    in training and under `torch.compile` the class's own `forward` runs, and where `why_not` has a reason.
    """
    reason = "it has other arguments than x" if len(args) != 1 or kwargs else _why_not(module, args[0])
    _patch.count(module, reason)
    return type(module).forward(module, *args, **kwargs) if reason else _fused(module, args[0])


def gemm(module: nn.Module) -> str:
    """What multiplies an MLP's quantised product by its down projection on the device where it is."""
    found = [gemm_of(weight) for weight in _weights(module)]
    return (found[-1] if found else "") or "none on this device"


def why_not(module: nn.Module) -> str:
    """What of an MLP itself, as it is now, keeps it from the fused path; "" for nothing."""
    if not _patch.own_class_forward(type(module)):
        return "its class has another forward"
    linears = projections(module)
    for name, child in module.named_children():
        if found := odd_linear(child) if child in linears else oddity(child):
            return f"{name} {found}"
    if not all(gemm_of(linear.weight) for linear in linears):
        return f"{linears[0].weight.device.type} has no GEMM of this format"
    return "" if linears else "it has no projections"


def _why_not(module: nn.Module, x: torch.Tensor) -> str:
    """Why a call runs the MLP's own forward; "" if the fused path covers it."""
    if torch.compiler.is_compiling():
        return "it is compiled"
    if found := _patch.not_inference(module, x.device):
        return found
    if type(x) is not torch.Tensor or x.dtype != torch.bfloat16:
        return f"x is a {type(x).__name__} of {x.dtype}, and the op is torchao's in bfloat16"
    if not x.numel():
        return "x is empty"
    return why_not(module)


def _fused(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The MLP's result for x [..., K]."""
    *first, down = (linear.weight for linear in projections(module))
    gate, *up = _products(x.reshape(-1, x.shape[-1]), first)
    out = product(_activated(gate, up[0] if up else None, down), down)
    return out.view(*x.shape[:-1], -1)


def _products(x: torch.Tensor, weights: list[Any]) -> list[torch.Tensor]:
    """x times each of some weights, quantised once for those that ask for the same."""
    quantised: dict[Any, QuantizedActivation] = {}
    found = []
    for weight in weights:
        asked = format_of(weight), "of all of x" if has_scale_of_all(weight) else id(global_scale(weight, x))
        if asked not in quantised:
            quantised[asked] = block_quantized(x, format_of(weight), global_scale=global_scale(weight, x))
        found.append(product(quantised[asked], weight))
    return found


def _activated(gate: torch.Tensor, up: torch.Tensor | None, weight: Any) -> QuantizedActivation:
    """SiLU of the gate times up, or of one half of the gate times the other, quantised for the weight."""
    if has_scale_of_all(weight):
        gate, up = (gate, up) if up is not None else gate.chunk(2, dim=-1)
        y = nn.functional.silu(gate) * up
        return block_quantized(y, format_of(weight), global_scale=global_scale(weight, y))
    scale = global_scale(weight, gate)
    return silu_mul_block_quantized(gate, format_of(weight), up=up, global_scale=scale, materialize=True)


def _weights(module: nn.Module) -> list[Any]:
    """Those weights of an MLP's projections that are torchao's."""
    weights = (getattr(linear, "weight", None) for linear in projections(module))
    return [weight for weight in weights if is_torchao(weight)]
