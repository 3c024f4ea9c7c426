"""`silu_mul_block_quant` in plain PyTorch; the formula is the docstring of `polyfuse.spec.silu_mul_block_quant`."""

import torch
from torch.nn.functional import silu

from polyfuse.spec import Capability
from polyfuse.torch_impl._quantise import quantise

CAPABILITY = Capability()


def silu_mul_block_quant(
    x: torch.Tensor,
    *,
    up: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
    expert_ends: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    limit_on: str = "input",
    materialize: bool = False,
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
    if up is None:
        gate, up = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    else:
        gate = x
    activate = activated_in_turn if materialize else _unrounded
    y = activate(gate, up, alpha, up_offset, limit, limit_on)
    if row_weight is not None:
        y = y * row_weight.float()[..., None]
        y = y.to(x.dtype) if materialize else y
    return quantise(
        y,
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


def _unrounded(
    gate: torch.Tensor, up: torch.Tensor, alpha: float, up_offset: float, limit: float | None, limit_on: str
) -> torch.Tensor:
    """y [..., D] in fp32."""
    gate, up = gate.float(), up.float()
    if limit is not None:
        gate, up = gate.clamp(max=limit) if limit_on == "input" else gate, up.clamp(-limit, limit)
    factor = up + up_offset if up_offset else up
    if limit_on == "silu":
        return (gate / (1 + torch.exp(-gate))).clamp(max=limit) * factor
    # Not silu(): on a CPU its last bit depends on the place of the element in the tensor.
    return gate * (factor / (1 + torch.exp(-gate if alpha == 1 else -(alpha * gate))))


def activated_in_turn(
    gate: torch.Tensor,
    up: torch.Tensor,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    limit_on: str = "input",
) -> torch.Tensor:
    """y [..., D] in the dtype of gate, to which everything but a clamp is rounded."""
    dtype = gate.dtype
    if limit is not None:
        gate, up = gate.float().clamp(max=limit) if limit_on == "input" else gate, up.float().clamp(-limit, limit)
    if alpha == 1:
        activated = silu(gate).to(dtype)
    else:
        inner = (gate.float() * alpha).to(dtype)
        activated = (gate.float() * torch.sigmoid(inner.float()).to(dtype).float()).to(dtype)
    if limit_on == "silu":
        activated = activated.float().clamp(max=limit)
    if up_offset:
        up = (up.float() + up_offset).to(dtype)
    return (activated * up).to(dtype)
