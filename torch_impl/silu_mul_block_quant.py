"""`silu_mul_block_quant` in plain PyTorch; the formula is the docstring of `polyfuse.spec.silu_mul_block_quant`."""

import torch
from torch.nn.functional import pad, silu

from polyfuse.spec import Capability
from polyfuse.spec.silu_mul_block_quant import QMAX, scale_floor, scale_strides

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
    limit: float | None = None,
    materialize: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and scale, each rounded once; rows past num_rows, which nothing may depend on, are like the others."""
    qmax = QMAX[quant_dtype]
    y = _activation(x, limit, materialize).unflatten(-1, (-1, group_size))  # [..., G, group_size]
    amax = y.abs().amax(-1)
    scale = amax / torch.full_like(amax, qmax)  # by a number, a GPU multiplies by its rounded reciprocal
    if scale_ub is not None:
        scale = torch.where(amax.isfinite(), scale.clamp(max=scale_ub), scale)
    scale = scale.clamp(min=scale_floor(quant_dtype))
    if scale_format != "float32":
        scale = _power_of_two_above(scale)
    q = (y / scale[..., None]).clamp(-qmax, qmax).flatten(-2)  # NaN passes both
    if quant_dtype == "int8":
        q = q.nan_to_num(nan=0.0).round()
    stored = _exponent_bytes(scale) if scale_format == "ue8m0_packed" else scale
    return q.to(getattr(torch, quant_dtype)), _laid_out(stored, scale_layout, num_rows is not None)


def _activation(x: torch.Tensor, limit: float | None, materialize: bool) -> torch.Tensor:
    """y [..., D] in fp32."""
    gate, up = x.chunk(2, -1)
    if limit is not None:
        gate, up = gate.float().clamp(max=limit), up.float().clamp(-limit, limit)
    if materialize:
        return (silu(gate).to(x.dtype) * up).to(x.dtype).float()
    gate = gate.float()
    # Not silu(): on a CPU its last bit depends on the place of the element in the tensor.
    return gate * (up.float() / (1 + torch.exp(-gate)))


def _power_of_two_above(scale: torch.Tensor) -> torch.Tensor:
    """The least power of two that is at least `scale`, a positive normal number; infinity and NaN stay."""
    bits = (scale.view(torch.int32) + 0x7FFFFF) & -0x800000
    return torch.where(scale.isnan(), scale, bits.view(torch.float32))


def _exponent_bytes(scale: torch.Tensor) -> torch.Tensor:
    """Four biased exponents per int32, the first lowest, padded with 0."""
    exponent = (scale.view(torch.int32) >> 23) & 0xFF
    quads = pad(exponent, (0, -exponent.shape[-1] % 4)).unflatten(-1, (-1, 4))
    return (quads << torch.arange(0, 32, 8, dtype=torch.int32, device=scale.device)).sum(-1, dtype=torch.int32)


def _laid_out(scale: torch.Tensor, layout: str, masked: bool) -> torch.Tensor:
    strides = scale_strides(scale.shape[:-1], scale.shape[-1], layout, masked)
    if strides is None:
        return scale
    return torch.empty_strided(scale.shape, strides, dtype=scale.dtype, device=scale.device).copy_(scale)
