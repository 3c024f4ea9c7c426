"""`rms_norm_block_quant` in plain PyTorch; the formula is the docstring of `polyfuse.spec.rms_norm_block_quant`."""

import torch

from polyfuse.spec import FP32_TINY, Capability
from polyfuse.torch_impl._quantise import quantise
from polyfuse.torch_impl._sums import fixed_sum

CAPABILITY = Capability()


def rms_norm_block_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
    expert_ends: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    group_size: int = 128,
    quant_dtype: str = "float8_e4m3fn",
    scale_format: str = "float32",
    scale_layout: str = "row_major",
    scale_ub: float | None = None,
    scale_min: float | None = None,
    reciprocal: bool = False,
    expert_alignment: int = 1,
    fill: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns q, scale and the sum; rows of no expert are like the others."""
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype).contiguous()
    rows = total.float().contiguous()  # summed in the same order whatever the layout
    mean = fixed_sum(rows.square(), -1) / max(x.shape[-1], 1)
    normalised = rows * (mean + max(eps, FP32_TINY)).rsqrt()  # never of 0: a zero row must give zeros
    q, scale = quantise(
        normalised * (weight.float() + weight_offset),
        num_rows=num_rows,
        expert_ends=expert_ends,
        global_scale=global_scale,
        group_size=group_size,
        quant_dtype=quant_dtype,
        scale_format=scale_format,
        scale_layout=scale_layout,
        scale_ub=scale_ub,
        scale_min=scale_min,
        reciprocal=reciprocal,
        expert_alignment=expert_alignment,
        fill=fill,
    )
    return q, scale, x.new_empty(0, x.shape[-1]) if residual is None else total
