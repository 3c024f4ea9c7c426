"""`rms_norm_block_quant`: root-mean-square normalisation, quantised block by block, in one pass.

    h      x, or with residual x + residual, rounded once to x's dtype and returned as sum
    n      h / sqrt(mean(h * h) + eps)                    the mean over the row's D columns
    y      n * (weight + weight_offset)                   in fp32, unrounded

`eps` is inside the root. `weight_offset` is the float32 nearest to the number given: 1 for a weight stored as what it
is above 1, as Qwen3-Next and Qwen3.5 do. A form that rounds n or y before it quantises is another function.
"""

from collections.abc import Mapping
from math import isfinite, prod, sqrt
from typing import Any

from polyfuse.spec._types import FLOATS, AttrSpec, Call, Cost, ErrorBound, OpSpec, OutputSpec, Step, TensorSpec
from polyfuse.spec._validate import fail, itemsize
from polyfuse.spec.block_quant import (
    QUANTISER,
    QUANTISER_ATTRS,
    QUANTISER_EDGE_CASES,
    QUANTISER_ERRORS,
    QUANTISER_OUTPUTS,
    QUANTISER_STEPS,
    QUANTISER_TENSORS,
    bytes_of_results,
    check_quantiser,
    derive_quantiser,
)

NAME = "rms_norm_block_quant"


def _check(call: Call) -> None:
    check_quantiser(call)
    eps, offset = call.attrs["eps"], call.attrs["weight_offset"]
    if not (eps > 0 and isfinite(eps)):
        fail(NAME, "eps", "a finite number > 0 (a zero row must give zeros)", eps)
    if not isfinite(offset):
        fail(NAME, "weight_offset", "a finite number", offset)


def _derive(call: Call) -> Mapping[str, Any]:
    return derive_quantiser(call) | {"S": tuple(call.dims["..."]) if "residual" in call.dtypes else (0,)}


def _cost(call: Call) -> Cost:
    rows, width, size = prod(call.dims["..."]), call.dims["D"], itemsize(call.dtypes["T"])
    sums = rows * width * size if "residual" in call.dtypes else 0
    read = rows * width * size + sums + width * itemsize(call.dtypes["weight"])
    return Cost(read, bytes_of_results(call) + sums, 9 * rows * width)


def _steps(names: Mapping[str, Any]) -> float:
    return sqrt(names["D"]) / 2 + 9


EXAMPLE = """
x, residual = torch.randn(2, 4, 512, dtype=torch.bfloat16)
q, scale, total = polyfuse.rms_norm_block_quant(x, torch.ones(512), residual=residual)
print(q.dtype, tuple(scale.shape), torch.equal(total, x + residual))
"""
PRINTED = "torch.float8_e4m3fn (4, 4) True"

SPEC = OpSpec(
    name=NAME,
    version=1,
    summary="Residual sum and root-mean-square normalisation followed by block-wise quantisation, in one pass.",
    formula=f"{__doc__ or ''}{QUANTISER}",
    source="Zhang, Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467; DeepSeek-V3, arXiv:2412.19437",
    example=(EXAMPLE, PRINTED),
    rows="...",
    independent=True,
    groups=("E",),
    tensors=(
        TensorSpec("x", ("...", "D"), FLOATS, "rows to normalise; leading dimensions with any strides", dtype_var="T"),
        TensorSpec("weight", ("D",), FLOATS, "a factor for each column, less weight_offset"),
        TensorSpec("residual", ("...", "D"), FLOATS, "added to x first", dtype_var="T", optional=True),
        *QUANTISER_TENSORS,
    ),
    attrs=(
        AttrSpec("eps", "float", 1e-6, "added to the mean square, inside the root; > 0"),
        AttrSpec("weight_offset", "float", 0.0, "added to the weight"),
        *QUANTISER_ATTRS,
    ),
    outputs=(
        *QUANTISER_OUTPUTS,
        OutputSpec("sum", ("S", "D"), "T", "x + residual; of no rows without residual"),
    ),
    errors=(
        ErrorBound(
            "y",
            _steps,
            "magnitude |y|. The partial sums of D positive terms are rounded up as often as down, so that a sum in any "
            "order is known to sqrt(D) roundings (four standard deviations of adding one by one), which the root "
            "halves; 3 for half of those of squares, mean and eps; 4 for a reciprocal root within 2 ulp and the "
            "product; 2 for weight + weight_offset and the product. A flushed y counts once, any other flushed number "
            "what multiplies it; flushed squares |y| / (mean + eps)",
            flushes=1,
        ),
        *QUANTISER_ERRORS,
        ErrorBound(
            "sum",
            1,
            "a sum in float32 before the rounding to the dtype; h is the one that is returned. A flushed one counts "
            "as 0",
            flushes=1,
        ),
    ),
    edge_cases=(
        *QUANTISER_EDGE_CASES,
        "A zero row gives zeros; an eps below 2^-126, the least normal float32, counts as that.",
        "A NaN in a row of h makes the row NaN; an infinite one makes itself NaN and the rest of its row 0.",
        "The sum of squares is fp32: beyond |h| of about 1.8e19 it is infinite, and finite elements become 0.",
        "Rows of sum that are not valid are not written.",
    ),
    core=(
        "float8_e4m3fn-residual_False",
        "float8_e4m3fn-residual_True",
        "int8-residual_True",
        "float32-offset_0.0",
        "bfloat16-offset_1.0",
        "float16-offset_1.0",
        "layout-ue8m0_packed-col_major_tma",
        "width_1000",
        "fill_nan_some",
        "fill_zeros",
        "eps_large",
        "mxfp8-swizzled",
        "nvfp4-row_major",
        "expert_ends_4-float32",
        "row_strided-one_of_three",
    ),
    check=_check,
    derive=_derive,
    cost=_cost,
    steps=(
        Step("add the residual", ("x", "residual"), ("sum",)),
        Step("RMS norm, times the weight", ("weight",)),
        *QUANTISER_STEPS,
    ),
)
