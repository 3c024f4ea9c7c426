"""`block_quant` in plain PyTorch; the formula is the docstring of `polyfuse.spec.block_quant`."""

import torch

from polyfuse.spec import Capability
from polyfuse.torch_impl._quantise import quantise

CAPABILITY = Capability()


def block_quant(
    x: torch.Tensor,
    *,
    num_rows: torch.Tensor | None = None,
    expert_ends: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    group_size: int = 128,
    quant_dtype: str = "float8_e4m3fn",
    scale_format: str = "float32",
    scale_layout: str = "row_major",
    scale_ub: float | None = None,
    scale_min: float | None = None,
    reciprocal: bool = False,
    expert_alignment: int = 1,
    fill: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns q and scale, each rounded once; rows of no expert are like the others."""
    return quantise(
        x,
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
