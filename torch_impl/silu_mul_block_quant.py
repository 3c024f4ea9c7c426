"""`silu_mul_block_quant` in plain PyTorch; the formula is the docstring of `polyfuse.spec.silu_mul_block_quant`."""

import torch

from polyfuse.spec import Capability
from polyfuse.unfused import block_quant, lay_out, silu_mul

CAPABILITY = Capability()


def silu_mul_block_quant(
    x: torch.Tensor,
    *,
    num_rows: torch.Tensor | None = None,
    group_size: int = 128,
    quant_dtype: str = "float8_e4m3fn",
    scale_format: str = "float32",
    scale_layout: str = "row_major",
    scale_ub: float | None = None,
    scale_min: float | None = None,
    limit: float | None = None,
    materialize: bool = False,
    reciprocal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and scale, each rounded once; rows past num_rows, which nothing may depend on, are like the others."""
    q, scale = block_quant(
        silu_mul(x, limit=limit) if materialize else _unrounded(x, limit),
        group_size=group_size,
        quant_dtype=quant_dtype,
        scale_format=scale_format,
        scale_ub=scale_ub,
        scale_min=scale_min,
        reciprocal=reciprocal,
    )
    return q, lay_out(scale, scale_layout, masked=num_rows is not None)


def _unrounded(x: torch.Tensor, limit: float | None) -> torch.Tensor:
    """y [..., D] in fp32."""
    gate, up = (half.float() for half in x.chunk(2, -1))
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    # Not silu(): on a CPU its last bit depends on the place of the element in the tensor.
    return gate * (up / (1 + torch.exp(-gate)))
