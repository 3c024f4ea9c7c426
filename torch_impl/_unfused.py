"""The two halves of `silu_mul_block_quant` as functions of their own, which check their arguments."""

import torch

from polyfuse.spec import FLOATS, dtype_name, fail
from polyfuse.spec.block_quant import FLOAT4, LARGEST_SCALE_MIN, LEAST_SCALE_MIN, QMAX
from polyfuse.torch_impl._quantise import quantise
from polyfuse.torch_impl.silu_mul_block_quant import activated_in_turn

QUANT_DTYPES = tuple(dtype for dtype in QMAX if dtype != FLOAT4)
SCALE_FORMATS = ("float32", "ue8m0", "ue8m0_packed")
SCALE_LAYOUTS = ("row_major", "col_major", "col_major_tma")


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
    return activated_in_turn(gate, up, limit=limit)


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
    scale_format ue8m0_packed. The arguments mean what they mean for `polyfuse.block_quant`, which has more of them.
    Raises `SpecError` for what that op would refuse.
    """
    quant_dtype = dtype_name(quant_dtype)
    _check_block_quant(y, group_size, quant_dtype, scale_format, scale_layout, scale_ub, scale_min)
    return quantise(
        y,
        group_size=group_size,
        quant_dtype=quant_dtype,
        scale_format=scale_format,
        scale_layout=scale_layout,
        scale_ub=scale_ub,
        scale_min=scale_min,
        reciprocal=reciprocal,
    )


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
        ("quant_dtype", quant_dtype, QUANT_DTYPES),
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
