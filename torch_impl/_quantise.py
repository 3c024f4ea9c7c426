"""Block quantisation in plain PyTorch; the formula is that of `polyfuse.spec.block_quant`."""

from math import inf

import torch
from torch.nn.functional import pad

from polyfuse.spec.block_quant import FLOAT4, LARGEST_E4M3, LEAST_DIVISOR, QMAX, ScaleForm, scale_floor, scale_form


def quantise(
    y: torch.Tensor,
    *,
    num_rows: torch.Tensor | None = None,
    expert_ends: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    group_size: int,
    quant_dtype: str,
    scale_format: str,
    scale_layout: str,
    scale_ub: float | None,
    scale_min: float | None,
    reciprocal: bool,
    expert_alignment: int = 1,
    fill: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and scale of `y` [..., D]; rows that are not valid, which nothing may depend on, are like the others in q."""
    qmax, width = QMAX[quant_dtype], y.shape[-1]
    y = y.float()
    if width % group_size:
        y = pad(y, (0, -width % group_size))
    groups = y.unflatten(-1, (-1, group_size))  # [..., G, group_size]
    amax = groups.abs().amax(-1)
    if scale_format == "e4m3":
        scale = _e4m3_scale(amax, qmax, global_scale)
        wide = scale.float() if global_scale is None else scale.float() * global_scale
        ratio = torch.where(scale.float()[..., None] == 0, 0.0, groups / wide[..., None])
    else:
        # A quotient by a number would be this product on a GPU.
        scale = amax * (1 / qmax) if reciprocal else amax / torch.full_like(amax, qmax)
        if scale_ub is not None:
            scale = torch.where(scale == inf, scale, scale.clamp(max=scale_ub))
        if scale_min != 0:
            scale = scale.clamp(min=scale_floor(quant_dtype, scale_min, scale_format))
        if scale_format != "float32":
            scale = _power_of_two_above(scale)
        ratio = groups / (scale.clamp(min=LEAST_DIVISOR) if scale_min == 0 else scale)[..., None]
    q = ratio.clamp(-qmax, qmax).flatten(-2)  # NaN passes both
    if width % group_size:
        q = q[..., :width]
    if quant_dtype == FLOAT4:
        stored_q = _pairs(_e2m1_codes(q))
    else:
        stored_q = (torch.where(q.isnan(), 0.0, q).round() if quant_dtype == "int8" else q).to(
            getattr(torch, quant_dtype)
        )
    form = scale_form(tuple(y.shape[:-1]), width, group_size, scale_format, scale_layout, num_rows is not None)
    valid = None
    if fill is not None or scale_layout == "swizzled_128x4":
        valid = _valid_rows(y.shape[:-1], y.device, num_rows, expert_ends, expert_alignment)
    stored_scale = _stored(scale, form, scale_format, scale_layout, num_rows is not None, valid, fill)
    return stored_q.contiguous(), stored_scale


def _e4m3_scale(amax: torch.Tensor, qmax: float, global_scale: torch.Tensor | None) -> torch.Tensor:
    """min(amax / (qmax * global_scale), 448) as float8_e4m3fn; NaN of an amax that is not finite."""
    divisor = torch.full_like(amax, qmax)
    scale = amax / (divisor if global_scale is None else divisor * global_scale)
    return torch.where(amax.isfinite(), scale.clamp(max=LARGEST_E4M3), torch.nan).to(torch.float8_e4m3fn)


def _power_of_two_above(scale: torch.Tensor) -> torch.Tensor:
    """The least power of two that is at least `scale`, a positive normal number; infinity and NaN stay."""
    bits = (scale.view(torch.int32) + 0x7FFFFF) & -0x800000
    return torch.where(scale.isnan(), scale, bits.view(torch.float32))


def _exponent_bytes(scale: torch.Tensor) -> torch.Tensor:
    """The biased exponent of each positive number."""
    return (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def _e2m1_codes(q: torch.Tensor) -> torch.Tensor:
    """The four bits of each number from -6 to 6, to nearest even; 0 for NaN."""
    size = q.abs()
    # Steps of 1/2 up to 2, of 1 up to 4, of 2 up to 6; `round` is to even, which is a code whose last bit is 0.
    half, whole, double = (2 * size).round(), size.round() + 2, (size / 2).round() + 4
    code = torch.where(size < 2, half, torch.where(size < 4, whole, double)).to(torch.uint8)
    return torch.where(q.isnan(), 0, code + (q.signbit() * 8).to(torch.uint8))


def _pairs(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the first in the low half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _stored(
    scale: torch.Tensor,
    form: ScaleForm,
    scale_format: str,
    layout: str,
    masked: bool,
    valid: torch.Tensor | None,
    fill: float | None,
) -> torch.Tensor:
    """The array of the scales [*lead, groups], of which those that are not valid hold `fill` if they must."""
    swizzled = layout == "swizzled_128x4"
    missing = None if fill is None else torch.full((), fill, dtype=torch.float32, device=scale.device)
    if scale_format == "ue8m0_packed" or (scale_format == "ue8m0" and swizzled):
        scale = _exponent_bytes(scale)
        missing = None if missing is None else _exponent_bytes(missing)
    elif missing is not None:
        missing = missing.to(scale.dtype)
    if missing is None and swizzled:
        missing = torch.zeros((), dtype=scale.dtype, device=scale.device)
    if missing is not None and valid is not None:
        scale = _where(valid[..., None], scale, missing)
    if swizzled and missing is not None:
        return _swizzled(scale if masked else scale.flatten(0, -2)[None], missing).view(form.shape)
    if scale_format == "ue8m0_packed":
        groups = scale.shape[-1]
        scale = pad(scale, (0, -groups % 4))
        if missing is not None and groups % 4:
            scale[..., groups:] = missing
        scale = scale.unflatten(-1, (-1, 4)).view(torch.int32).squeeze(-1)
        missing = None if missing is None else missing.repeat(4).view(torch.int32)[0]
    if form.strides is None:
        return scale.contiguous()
    if missing is None or scale.numel() == 0:
        return torch.empty_strided(form.shape, form.strides, dtype=scale.dtype, device=scale.device).copy_(scale)
    last = sum((size - 1) * stride for size, stride in zip(form.shape, form.strides, strict=True))
    buffer = torch.empty(last + 1, dtype=scale.dtype, device=scale.device)
    _bits(buffer)[:] = _bits(missing)
    return buffer.as_strided(form.shape, form.strides).copy_(scale)


def _valid_rows(
    lead: torch.Size,
    device: torch.device,
    num_rows: torch.Tensor | None,
    expert_ends: torch.Tensor | None,
    alignment: int,
) -> torch.Tensor | None:
    """Whether each row counts [*lead]; None if all do."""
    if num_rows is not None:
        return torch.arange(lead[1], device=device) < num_rows[:, None]
    if expert_ends is None:
        return None
    row, ends = torch.arange(lead[0], device=device), expert_ends.long()
    first = (torch.cat([ends.new_zeros(1), ends[:-1]]) + alignment - 1) // alignment * alignment
    owner = torch.searchsorted(ends, row, right=True)  # the first expert that ends behind the row
    return (owner < len(ends)) & (row >= first[owner.clamp(max=len(ends) - 1)]) if len(ends) else row < 0


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: some operations have no 8-bit floats."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor.view(torch.int32)


def _where(condition: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, _bits(one), _bits(other)).view(one.dtype)


def _swizzled(scale: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Scales [experts, rows, groups] of one byte in blocks of 128 rows and 4 groups, in the order of memory."""
    experts, rows, groups = scale.shape
    blocks, columns = -(-rows // 128), -(-groups // 4)
    whole = torch.empty(experts, blocks * 128, columns * 4, dtype=torch.uint8, device=scale.device)
    whole[:] = _bits(padding)
    whole[:, :rows, :groups] = _bits(scale)
    tiles = whole.view(experts, blocks, 4, 32, columns, 4).permute(0, 1, 4, 3, 2, 5)
    return tiles.contiguous().view(scale.dtype)
