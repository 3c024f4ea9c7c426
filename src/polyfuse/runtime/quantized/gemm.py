"""Products of quantised activations: float8_e4m3fn in blocks of 1 x 128, with weights in blocks of 128 x 128."""

from functools import cache

import torch
from torch.nn.functional import ScalingType, pad, scaled_mm

from polyfuse.runtime.quantized.activation import QuantizedActivation
from polyfuse.spec import FLOATS, dtype_name, fail

BLOCK = 128  # rows and columns of a weight, and columns of an activation, that share a scale
ALIGNED = 4  # cuBLASLt takes multiples of this many rows, and of this many blocks along K
BEGIN = 16  # and arrays that begin at a multiple of this many bytes


def gemm_for(device: torch.device, dtype: torch.dtype) -> str:
    """How `block_scaled_mm` computes results of a dtype on a device; "" if it cannot."""
    if device.type == "cpu":
        return "written-out products on the CPU" if dtype_name(dtype) in FLOATS else ""
    if device.type == "cuda" and dtype == torch.bfloat16 and _has_scaled_mm(device):
        return "torch.nn.functional.scaled_mm"
    return ""


def block_scaled_mm(
    activation: QuantizedActivation, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """An activation [M, K] times the transpose of `weight` [N, K], as `dtype` [M, N].

    Both are float8_e4m3fn, with float32 scales; `weight_scale` is [N / 128, K / 128]. Each block along K is a float32
    sum of products, times the two scales, and the blocks are summed up in float32. On a CPU a block's sum is exact
    before it is rounded; elsewhere it is `scaled_mm`, with M a multiple of 4. Scales that are column-major save a copy,
    and views that do not begin at a multiple of 16 bytes are copied. Raises `SpecError` for other formats and shapes.
    """
    check_product(activation, weight, weight_scale)
    return product(activation.values, activation.scales, weight, weight_scale, dtype)


def product(
    q: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`block_scaled_mm` of arrays that `check_product` has let pass."""
    if q.device.type != "cpu":
        missing = -weight_scale.shape[1] % ALIGNED
        blocks = pad(weight_scale, (0, missing)) if missing else weight_scale
        recipes = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
        rows, columns, scales, blocks = (readable(x) for x in (q, weight, scale.t().contiguous(), blocks))
        return scaled_mm(rows, columns.t(), scales.t(), recipes[0], blocks.t(), recipes[1], output_dtype=dtype)
    columns = weight_scale.repeat_interleave(BLOCK, dim=0)  # [N, K / 128]
    total = scale.new_zeros(len(q), len(weight))
    for block, (part, weight_part) in enumerate(zip(q.split(BLOCK, dim=1), weight.split(BLOCK, dim=1), strict=True)):
        products = (part.double() @ weight_part.double().t()).float()  # float64 holds any sum of 128 exactly
        total += products * scale[:, block, None] * columns[:, block]
    return total.to(dtype)


def readable(x: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if it is a view that begins in between; a storage does not."""
    return x.clone() if x.storage_offset() * x.element_size() % BEGIN else x


def check_product(activation: QuantizedActivation, weight: torch.Tensor, weight_scale: torch.Tensor) -> None:
    """Raise `SpecError` for what `block_scaled_mm` does not take."""
    given = activation.format
    if (given.group_size, given.quant_dtype, given.scale_format) != (BLOCK, "float8_e4m3fn", "float32"):
        expected = f"a format of group_size={BLOCK}, float8_e4m3fn and float32"
        fail(
            "block_scaled_mm", "activation", expected, f"{given.group_size}, {given.quant_dtype}, {given.scale_format}"
        )
    if given.scale_layout not in ("row_major", "col_major"):
        fail("block_scaled_mm", "activation", "scales that are row_major or col_major", given.scale_layout)
    if activation.values.ndim != 2:
        fail("block_scaled_mm", "activation", "2 dimensions", activation.values.ndim)
    width = activation.values.shape[1]
    if weight.dtype != torch.float8_e4m3fn or weight.ndim != 2 or weight.shape[1] != width:
        got = f"{dtype_name(weight.dtype)} {list(weight.shape)}"
        fail("block_scaled_mm", "weight", f"float8_e4m3fn [N, {width}]", got)
    if len(weight) % BLOCK or width % BLOCK:
        fail("block_scaled_mm", "weight", f"multiples of {BLOCK} rows and columns", list(weight.shape))
    blocks = [size // BLOCK for size in weight.shape]
    if weight_scale.dtype != torch.float32 or list(weight_scale.shape) != blocks:
        got = f"{dtype_name(weight_scale.dtype)} {list(weight_scale.shape)}"
        fail("block_scaled_mm", "weight_scale", f"float32 {blocks}", got)


@cache
def _has_scaled_mm(device: torch.device) -> bool:
    """Whether PyTorch multiplies 1 x 128 by 128 x 128 blocks there."""
    version = tuple(map(int, (torch.version.cuda or "0").split(".")[:2]))  # none on ROCm
    return version >= (12, 9) and torch.cuda.get_device_capability(device)[0] == 9
