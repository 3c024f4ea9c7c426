"""`gdn_in_proj`: the two input projections of a Gated DeltaNet layer, which share one activation.

    qkvz = x @ [w_qkvz | w_z].T (+ bias_qkvz)        the rows of w_qkvz, then those of w_z
    ba   = x @ [w_ba | w_a].T   (+ bias_ba)

A model that holds its weights as two tensors gives w_qkvz and w_ba. One that holds them as four (Qwen3.5: in_proj_qkv,
in_proj_z, in_proj_b, in_proj_a) gives the second as w_z and the fourth as w_a. All of them are read where they are.
M1 = N1 + NZ and M2 = N2 + NA are the widths of the results; a weight that is not given has no rows.

Products accumulate in fp32 or wider, the bias is added before the one rounding. The strategies give the same
function, to the accuracy of a GEMM:

    sequential   one product after the other
    parallel     the products of ba on an auxiliary stream; bitwise equal to sequential
    merged       one product, of weights that are one matrix already: the given ones lie right behind one another in
                 memory, in the order [w_qkvz | w_z | w_ba | w_a], as `polyfuse.runtime.stack_weights` makes them.
                 A backend of arrays that have addresses declines others; JAX joins them inside the compiled function
    fused        one launch over all weights, for few rows
    auto         the fastest of them by a table measured per device; it takes merged only for weights that are one
                 already, and parallel only inside a graph capture, where launches cost the host nothing. For sizes
                 that the table lacks it is sequential, or, for few rows of 16-bit numbers on a GPU, fused

A GEMM library picks its kernel by size, so this op alone is not bitwise batch-invariant.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from polyfuse.spec._types import FLOATS, AttrSpec, Call, Cost, ErrorBound, OpSpec, OutputSpec, Step, TensorSpec
from polyfuse.spec._validate import fail, itemsize

NAME = "gdn_in_proj"
STRATEGIES = ("auto", "sequential", "parallel", "merged", "fused")


def _check(call: Call) -> None:
    if not call.dims["..."]:
        fail(NAME, "x", "at least 2 dimensions", 1)


def _derive(call: Call) -> Mapping[str, Any]:
    z, a = (call.dims.get(name, 0) for name in ("NZ", "NA"))
    return {"NZ": z, "NA": a, "M1": call.dims["N1"] + z, "M2": call.dims["N2"] + a}


def _cost(call: Call) -> Cost:
    d, size = call.dims, itemsize(call.dtypes["T"])
    rows, columns = prod(d["..."]), d["M1"] + d["M2"]
    read = (rows * d["hidden"] + columns * d["hidden"]) * size
    return Cost(read, rows * columns * size, 2 * rows * columns * d["hidden"])


_SUM_REASON = (
    "magnitude sum |x * w| + |bias|. Sums that round to nearest err up as often as down: vector lanes and matrix units "
    "stay within 8 roundings of it at any hidden size. 0 where all inputs are integers and the sum is below 2^24: then "
    "every partial sum is exact in float32. Each x, w, product, bias and result may be flushed, which counts |w|, |x| "
    "and once"
)
# Products that a matrix unit adds to its accumulator at a time, at least. On an H200 sums of 2048 positive bfloat16
# products were off by 88 roundings of the sum, of which 128 are granted; sums of either sign by 6 of sum |x * w|.
PRODUCTS_PER_SUM = 16


def _accumulator_steps(names: Mapping[str, Any]) -> float:
    return names["hidden"] / PRODUCTS_PER_SUM


EXAMPLE = """
x = torch.randn(4, 64)
qkvz, ba = polyfuse.gdn_in_proj(x, torch.randn(96, 64), torch.randn(8, 64))
print(tuple(qkvz.shape), tuple(ba.shape))
"""
PRINTED = "(4, 96) (4, 8)"

SPEC = OpSpec(
    name=NAME,
    version=2,
    summary="Two input projections of one activation, run one after the other, side by side, or as one.",
    formula=__doc__ or "",
    source="Transformers Qwen3NextGatedDeltaNet (in_proj_qkvz, _ba), Qwen3_5GatedDeltaNet (in_proj_qkv, _z, _b, _a)",
    example=(EXAMPLE, PRINTED),
    rows="...",
    tensors=(
        TensorSpec("x", ("...", "hidden"), FLOATS, "the activation; leading dimensions are rows", dtype_var="T"),
        TensorSpec("w_qkvz", ("N1", "hidden"), FLOATS, "the large weight, or its first rows", dtype_var="T"),
        TensorSpec("w_ba", ("N2", "hidden"), FLOATS, "the small weight, or its first rows", dtype_var="T"),
        TensorSpec("w_z", ("NZ", "hidden"), FLOATS, "the rows after those of w_qkvz", dtype_var="T", optional=True),
        TensorSpec("w_a", ("NA", "hidden"), FLOATS, "the rows after those of w_ba", dtype_var="T", optional=True),
        TensorSpec("bias_qkvz", ("M1",), FLOATS, "bias of the whole large projection", dtype_var="T", optional=True),
        TensorSpec("bias_ba", ("M2",), FLOATS, "bias of the whole small projection", dtype_var="T", optional=True),
    ),
    attrs=(AttrSpec("strategy", "enum", "auto", "how the two products are run", STRATEGIES),),
    outputs=(
        OutputSpec("qkvz", ("...", "M1"), "T", "the large projection", sliced=True),
        OutputSpec("ba", ("...", "M2"), "T", "the small projection", sliced=True),
    ),
    errors=(
        ErrorBound(
            "accumulator",
            _accumulator_steps,
            "magnitude |x @ w.T + bias|: a matrix unit that truncates its accumulator errs in one direction, by one "
            "rounding of the running sum for each 16 products",
        ),
        ErrorBound("qkvz", 8, f"the error of the accumulator, and {_SUM_REASON}", flushes=1),
        ErrorBound("ba", 8, f"the error of the accumulator, and {_SUM_REASON}", flushes=1),
    ),
    edge_cases=(
        "No rows, or weights without rows: results without elements. hidden == 0: zero, plus the bias.",
        "Subnormal float32 numbers, inputs and results, may count as zero.",
        "w_z and w_a are independent: either may be given alone.",
        "With strategy merged, outside torch.compile, the results are views of one buffer: rows are strided.",
    ),
    check=_check,
    derive=_derive,
    core=(
        "bfloat16-auto",
        "float32-auto",
        "float16-auto",
        "bias-auto",
        "lead_1-auto",
        "lead_17-sequential",
        "odd_sizes-auto",
        "strided-auto",
        "nan_some-auto",
        "integers-auto",
        "four_weights-bfloat16-auto",
        "four_weights-float32-auto",
    ),
    cost=_cost,
    steps=(
        Step("x @ [w_qkvz | w_z].T + bias", ("x", "w_qkvz", "w_z", "bias_qkvz"), ("qkvz",)),
        Step("x @ [w_ba | w_a].T + bias", ("w_ba", "w_a", "bias_ba"), ("ba",)),
    ),
)
