"""`silu_mul_block_quant` in plain PyTorch; the formula is the docstring of `polyfuse.spec.silu_mul_block_quant`.

The op is its two halves in turn, `silu_mul` and `block_quant`, which users reach as `polyfuse.unfused`.
"""

from math import inf

import torch
from torch.nn.functional import pad, silu

from polyfuse.spec import FLOATS, Capability, dtype_name, fail
from polyfuse.spec.silu_mul_block_quant import (
    LARGEST_SCALE_MIN,
    LEAST_DIVISOR,
    LEAST_SCALE_MIN,
    QMAX,
    SCALE_FORMATS,
    SCALE_LAYOUTS,
    scale_floor,
    scale_strides,
)

CAPABILITY = Capability()


def silu_mul_block_quant(
    x: torch.Tensor,
    *,
    up: torch.Tensor | None = None,
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
    """Returns q and scale, each rounded once; rows past num_rows, which nothing may depend on, are like the others."""
    gate, factor = x.chunk(2, -1) if up is None else (x, up)
    q, scale = block_quant(
        (_rounded if materialize else _unrounded)(gate, factor, limit),
        group_size=group_size,
        quant_dtype=quant_dtype,
        scale_format=scale_format,
        scale_ub=scale_ub,
        scale_min=scale_min,
        reciprocal=reciprocal,
    )
    return q, _lay_out(scale, scale_layout, masked=num_rows is not None)


def _unrounded(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """y [..., D] in fp32."""
    gate, up = gate.float(), up.float()
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    # Not silu(): on a CPU its last bit depends on the place of the element in the tensor.
    return gate * (up / (1 + torch.exp(-gate)))


def _rounded(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """y [..., D] in the dtype of gate, to which silu(gate) and the product are rounded."""
    dtype = gate.dtype
    if limit is not None:
        gate, up = gate.float().clamp(max=limit), up.float().clamp(-limit, limit)
    return (silu(gate).to(dtype) * up).to(dtype)


def silu_mul(x: torch.Tensor, *, limit: float | None = None) -> torch.Tensor:
    """silu(gate) * up of `x` [..., 2*D] = [gate | up], as [..., D] in x's dtype (float32, bfloat16 or float16).

    silu(gate) and then the product are rounded to that dtype. `limit=c` first clamps gate to at most c and up to
    [-c, c], in float32. Raises `SpecError` for another dtype, an odd last dimension or a limit that is not > 0.
    """
    _check_dtype("silu_mul", "x", x)
    if not x.ndim or x.shape[-1] % 2:
        fail("silu_mul", "x", "an even last dimension", list(x.shape))
    if limit is not None and not limit > 0:
        fail("silu_mul", "limit", "a number > 0", limit)
    gate, up = x.chunk(2, -1)
    return _rounded(gate, up, limit)


def block_quant(
    y: torch.Tensor,
    *,
    group_size: int = 128,
    quant_dtype: str | torch.dtype = "float8_e4m3fn",
    scale_format: str = "float32",
    scale_layout: str = "row_major",
    scale_ub: float | None = None,
    scale_min: float | None = None,
    reciprocal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous q [..., D] and scale [..., G] of `y` [..., D] (float32, bfloat16 or float16).

    Each scale is that of group_size columns: G is D / group_size, rounded up to whole int32 words of four scales for
    scale_format ue8m0_packed. The arguments mean what they mean for `polyfuse.silu_mul_block_quant`.
    Raises `SpecError` for what that op would refuse.
    """
    quant_dtype = dtype_name(quant_dtype)
    _check_block_quant(y, group_size, quant_dtype, scale_format, scale_layout, scale_ub, scale_min)
    qmax = QMAX[quant_dtype]
    groups = y.float().unflatten(-1, (-1, group_size))  # [..., G, group_size]
    amax = groups.abs().amax(-1)
    # A quotient by a number would be this product on a GPU.
    scale = amax * (1 / qmax) if reciprocal else amax / torch.full_like(amax, qmax)
    if scale_ub is not None:
        scale = torch.where(scale == inf, scale, scale.clamp(max=scale_ub))
    if scale_min != 0:
        scale = scale.clamp(min=scale_floor(quant_dtype, scale_min))
    if scale_format != "float32":
        scale = _power_of_two_above(scale)
    divisor = scale.clamp(min=LEAST_DIVISOR) if scale_min == 0 else scale
    q = (groups / divisor[..., None]).clamp(-qmax, qmax).flatten(-2)  # NaN passes both
    if quant_dtype == "int8":
        q = torch.where(q.isnan(), 0.0, q).round()
    stored = _exponent_bytes(scale) if scale_format == "ue8m0_packed" else scale
    return q.to(getattr(torch, quant_dtype)).contiguous(), _lay_out(stored, scale_layout)


def _lay_out(scale: torch.Tensor, layout: str, *, masked: bool = False) -> torch.Tensor:
    """Scales [..., G] in one of the spec's memory layouts, per entry of the first dimension if `masked`."""
    strides = scale_strides(scale.shape[:-1], scale.shape[-1], layout, masked)
    if strides is None:
        return scale.contiguous()
    return torch.empty_strided(scale.shape, strides, dtype=scale.dtype, device=scale.device).copy_(scale)


def _check_dtype(function: str, name: str, tensor: torch.Tensor) -> None:
    if dtype_name(tensor.dtype) not in FLOATS:
        fail(function, name, f"dtype {' or '.join(FLOATS)}", dtype_name(tensor.dtype))


def _check_block_quant(
    y: torch.Tensor,
    group_size: int,
    quant_dtype: str,
    scale_format: str,
    scale_layout: str,
    scale_ub: float | None,
    scale_min: float | None,
) -> None:
    _check_dtype("block_quant", "y", y)
    for name, value, known in (
        ("quant_dtype", quant_dtype, tuple(QMAX)),
        ("scale_format", scale_format, SCALE_FORMATS),
        ("scale_layout", scale_layout, SCALE_LAYOUTS),
    ):
        if value not in known:
            fail("block_quant", name, f"one of {', '.join(known)}", value)
    if y.ndim < 2:
        fail("block_quant", "y", "at least 2 dimensions", y.ndim)
    if group_size < 1:
        fail("block_quant", "group_size", "an integer >= 1", group_size)
    if y.shape[-1] % group_size:
        fail("block_quant", "y", f"a last dimension divisible by group_size={group_size}", y.shape[-1])
    if scale_ub is not None and not scale_ub > 0:
        fail("block_quant", "scale_ub", "a number > 0", scale_ub)
    if scale_min == 0:
        if scale_format != "float32":
            fail("block_quant", "scale_min", f"a number > 0 with scale_format={scale_format}", scale_min)
    elif scale_min is not None and not LEAST_SCALE_MIN <= scale_min <= LARGEST_SCALE_MIN:
        fail("block_quant", "scale_min", "0 or a number from 2**-126 to 2**127", scale_min)


def _power_of_two_above(scale: torch.Tensor) -> torch.Tensor:
    """The least power of two that is at least `scale`, a positive normal number; infinity and NaN stay."""
    bits = (scale.view(torch.int32) + 0x7FFFFF) & -0x800000
    return torch.where(scale.isnan(), scale, bits.view(torch.float32))


def _exponent_bytes(scale: torch.Tensor) -> torch.Tensor:
    """Four biased exponents per int32, the first lowest, padded with 0."""
    exponent = (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return pad(exponent, (0, -exponent.shape[-1] % 4)).unflatten(-1, (-1, 4)).view(torch.int32).squeeze(-1)
