"""FP8 weights for a model's MLPs and experts, and the linear function that Transformers would take from the hub."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.functional import pad

from polyfuse.runtime.quantized.activation import QuantizedActivation, QuantizedFormat
from polyfuse.runtime.quantized.gemm import ALIGNED, BLOCK, block_scaled_mm
from polyfuse.unfused import block_quant

MLP = "gate_proj", "up_proj", "down_proj"


def quantise(model: nn.Module) -> None:
    """Put weights of float8_e4m3fn in blocks of 128 x 128, as Transformers keeps them, into a model's MLPs and experts.

    Experts then run as Transformers' loop over them, each in two calls of its FP8 linear function.
    """
    for module in list(model.modules()):
        children = module._modules
        if all(name in children for name in MLP):
            for name in MLP:
                setattr(module, name, _quantised(children[name]))
        if (experts := children.get("experts")) is not None:
            module.experts = _quantised_experts(experts)
            model.set_experts_implementation("eager")  # type: ignore[operator]


def fp8_linear(device: str) -> AbstractContextManager[Any]:
    """A block in which Transformers has an FP8 linear function; it would take one from the hub.

    The activation is quantised by `polyfuse.unfused.block_quant`, under torch.compile on an accelerator, and multiplied
    by the GEMM that the accelerated model has. Untouched and accelerated models both call it.
    """
    from transformers.integrations import finegrained_fp8

    quantise = block_quant if device == "cpu" else torch.compile(block_quant, dynamic=True)
    return patch.object(finegrained_fp8, "fp8_linear", _linear_of(quantise))


def _quantised(linear: Any) -> nn.Module:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    with torch.device(linear.weight.device):
        fp8: Any = FP8Linear(linear.in_features, linear.out_features, block_size=(BLOCK, BLOCK)).requires_grad_(False)
    _fill(fp8.weight, fp8.weight_scale_inv, linear.weight)
    return fp8.eval()


def _quantised_experts(experts: Any) -> nn.Module:
    from transformers.integrations.finegrained_fp8 import FP8Experts

    with torch.device(experts.down_proj.device):
        fp8: Any = FP8Experts(experts.config, block_size=(BLOCK, BLOCK)).requires_grad_(False)
    _fill(fp8.gate_up_proj, fp8.gate_up_proj_scale_inv, experts.gate_up_proj)
    _fill(fp8.down_proj, fp8.down_proj_scale_inv, experts.down_proj)
    return fp8.eval()


def _fill(values: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor) -> None:
    """Quantise a weight [..., N, K], each block by its largest value."""
    blocks = weight.detach().float().unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale = blocks.abs().amax((-3, -1)) / 448  # [..., N / 128, K / 128]
    scales.copy_(scale)
    values.copy_((blocks / scale[..., :, None, :, None]).flatten(-2).flatten(-3, -2).to(torch.float8_e4m3fn))


def _linear_of(quantise: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., torch.Tensor]:
    def fp8_linear(
        input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *rest: Any, **options: Any
    ) -> torch.Tensor:
        rows = input.flatten(0, -2)
        q, row_scale = quantise(
            pad(rows, (0, 0, 0, -len(rows) % ALIGNED)), group_size=BLOCK, scale_layout="col_major", scale_min=0.0
        )
        activation = QuantizedActivation(q, row_scale, QuantizedFormat(scale_layout="col_major"))
        out = block_scaled_mm(activation, weight, scale, input.dtype)[: len(rows)]
        return out.view(*input.shape[:-1], len(weight))

    return fp8_linear
