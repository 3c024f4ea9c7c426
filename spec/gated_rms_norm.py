"""`gated_rms_norm`: the end of a Gated DeltaNet layer's heads, an RMS norm times a gate, in one pass.

Each row of x and the row of the gate beside it, of V columns:

    n    x / sqrt(mean(x * x) + eps)
    act  gate * sigmoid(gate), or sigmoid(gate) with activation="sigmoid"
    y    n * (weight + weight_offset) * act          from left to right

`eps` is inside the root. `weight_offset` is the float32 nearest to the number given: 1 for a weight stored as what it
is above 1. The norm comes first: the gate is no part of the mean.
All arithmetic is fp32 or wider, with one rounding. A form that rounds n, and then its product with the weight, to x's
dtype, as Transformers does, is another function.
All dimensions but the last may have any strides, those of x and of the gate their own: a gate is often a column slice
of the projection that made it, and is read where it is. Both have the same dimensions; Qwen3-Next's are
[rows, H, HV/H, V].
"""

from collections.abc import Mapping
from math import isfinite, prod, sqrt
from typing import Any

from polyfuse.spec._types import FLOATS, AttrSpec, Call, Cost, ErrorBound, OpSpec, OutputSpec, Step, TensorSpec
from polyfuse.spec._validate import fail, itemsize

NAME = "gated_rms_norm"

ACTIVATIONS = ("silu", "sigmoid")


def _check(call: Call) -> None:
    eps, offset = call.attrs["eps"], call.attrs["weight_offset"]
    if not (eps > 0 and isfinite(eps)):
        fail(NAME, "eps", "a finite number > 0 (a zero row must give zeros)", eps)
    if not isfinite(offset):
        fail(NAME, "weight_offset", "a finite number", offset)


def _cost(call: Call) -> Cost:
    rows, width = prod(call.dims["..."]), call.dims["V"]
    size = itemsize(call.dtypes["T"])
    read = rows * width * (size + itemsize(call.dtypes["gate"])) + width * itemsize(call.dtypes["weight"])
    return Cost(read, rows * width * size, 12 * rows * width)


def _steps(names: Mapping[str, Any]) -> float:
    return sqrt(names["V"]) / 2 + 10


EXAMPLE = """
x, gate = torch.randn(2, 6, 4, 16)  # six rows of four heads
y = polyfuse.gated_rms_norm(x, gate, torch.ones(16))
print(tuple(y.shape))
"""
PRINTED = "(6, 4, 16)"

SPEC = OpSpec(
    name=NAME,
    version=1,
    summary="Root-mean-square normalisation of each row, times a weight and an activated gate, in one pass.",
    formula=__doc__ or "",
    source=(
        "Zhang, Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467; Transformers Qwen3NextRMSNormGated; "
        "Qwen3.5"
    ),
    example=(EXAMPLE, PRINTED),
    rows="...",
    independent=True,
    tensors=(
        TensorSpec("x", ("...", "V"), FLOATS, "rows to normalise", dtype_var="T"),
        TensorSpec("gate", ("...", "V"), FLOATS, "what each element is gated by, before its activation"),
        TensorSpec("weight", ("V",), FLOATS, "a factor for each column, less weight_offset"),
    ),
    attrs=(
        AttrSpec("eps", "float", 1e-6, "added to the mean square, inside the root; > 0"),
        AttrSpec("activation", "enum", "silu", "of the gate", ACTIVATIONS),
        AttrSpec("weight_offset", "float", 0.0, "added to the weight"),
    ),
    outputs=(OutputSpec("y", ("...", "V"), "T", "normalised and gated rows"),),
    errors=(
        ErrorBound(
            "act",
            8,
            "magnitude |act| * (1 + max(-gate, 0)), as an exponential turns the rounding of its argument into a "
            "relative error. At gate = 0, where that adds least: 2 for half of an exponential within 2 ulp, 1 for "
            "1 + exp, 4 for a division within 2 ulp, 1 for the product of silu. A flushed gate counts once, as does a "
            "flushed act; the flushed sigmoid of silu |gate| times",
            flushes=1,
        ),
        ErrorBound(
            "y",
            _steps,
            "magnitude |y|. The partial sums of V positive terms are rounded up as often as down, so that a sum in any "
            "order is known to sqrt(V) roundings (four standard deviations of adding one by one), which the root "
            "halves; 3 for half of those of squares, mean and eps; 4 for a reciprocal root within 2 ulp and the "
            "product; 3 for weight + weight_offset and two products. To this comes the error of act times the rest. "
            "A flushed y counts once, any other flushed number what multiplies it; flushed squares |y| / eps",
            flushes=1,
        ),
    ),
    edge_cases=(
        "No rows, or V == 0: an empty result, without a launch. Without leading dimensions x is one row.",
        "A zero row gives zeros; an eps below 2^-126, the least normal float32, counts as that.",
        "A NaN in x makes its row NaN; one in the gate or the weight only what it multiplies.",
        "The sum of squares is fp32: beyond |x| of about 1.8e19 it is infinite, and finite elements become 0; an "
        "infinite one makes itself NaN and the rest of its row 0. n * (weight + weight_offset) beyond float32 is "
        "infinite.",
        "A gate of -infinity gives NaN with silu, which is -infinity * 0 there, and 0 with sigmoid.",
        "Subnormal float32 numbers, inputs and results, may count as zero: with an infinite factor, y is then "
        "infinite or NaN.",
    ),
    core=(
        "bfloat16-silu-offset_0.0",
        "float32-sigmoid-offset_1.0",
        "float16-silu-offset_0.0",
        "dtypes_bfloat16-float32-float32",
        "gate_sliced-bfloat16",
        "gate_sliced-float32",
        "gate_second_half",
        "width_128",
        "lead_2x3",
        "x_zeros",
        "x_nan_some",
        "gate_inf_some-silu",
    ),
    check=_check,
    cost=_cost,
    steps=(
        Step("RMS norm of each row", ("x",)),
        Step("times the weight", ("weight",)),
        Step("times SiLU of the gate", ("gate",), ("y",)),
    ),
)
