"""The two halves of `silu_mul_block_quant` as functions of their own, which check their arguments."""

import torch

from polyfuse.spec import FLOATS, bind, dtype_name, fail
from polyfuse.spec.block_quant import SPEC
from polyfuse.torch_impl._quantise import quantise
from polyfuse.torch_impl.silu_mul_block_quant import activated_in_turn


def silu_mul(x: torch.Tensor, *, limit: float | None = None) -> torch.Tensor:
    """silu(gate) * up of `x` [..., 2*D] = [gate | up], as [..., D] in x's dtype (float32, bfloat16 or float16).

    silu(gate) and then the product are rounded to that dtype. `limit=c` first clamps gate to at most c and up to
    [-c, c], in float32. Raises `SpecError` for another dtype, an odd last dimension or a limit that is not > 0.
    """
    if dtype_name(x.dtype) not in FLOATS:
        fail("silu_mul", "x", f"dtype {' or '.join(FLOATS)}", dtype_name(x.dtype))
    if not x.ndim or x.shape[-1] % 2:
        fail("silu_mul", "x", "an even last dimension", list(x.shape))
    if limit is not None and not limit > 0:
        fail("silu_mul", "limit", "a number > 0", limit)
    gate, up = x.chunk(2, -1)
    return activated_in_turn(gate, up, limit=limit)


def block_quant(
    x: torch.Tensor,
    *,
    group_size: int = 128,
    quant_dtype: str | torch.dtype = "float8_e4m3fn",
    scale_format: str = "float32",
    scale_layout: str = "row_major",
    scale_ub: float | None = None,
    scale_min: float | None = None,
    reciprocal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous q and scale of `x` [..., D] (float32, bfloat16 or float16).

    The arguments and results are those of `polyfuse.block_quant`, which has more of them, and what that op refuses
    raises `SpecError`.
    """
    given = {
        "x": x,
        "group_size": group_size,
        "quant_dtype": quant_dtype,
        "scale_format": scale_format,
        "scale_layout": scale_layout,
        "scale_ub": scale_ub,
        "scale_min": scale_min,
        "reciprocal": reciprocal,
    }
    return quantise(x, **bind(SPEC, SPEC.parameters | given).attrs)
