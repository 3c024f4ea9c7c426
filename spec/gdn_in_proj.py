"""`gdn_in_proj`: the two input projections of a Gated DeltaNet layer, which share one activation.

    qkvz = x @ w_qkvz.T (+ bias_qkvz)
    ba   = x @ w_ba.T   (+ bias_ba)

Products accumulate in fp32 or wider, the bias is added before the one rounding. The strategies give the same
function, to the accuracy of a GEMM:

    sequential   one product after the other
    parallel     the second product on an auxiliary stream; bitwise equal to sequential
    merged       one product with both weights as one matrix. Weights that lie behind one another in memory
                 (see `polyfuse.runtime.stack_weights`) are used as they are; others are concatenated once
                 and the copy is kept as long as the weights live
    fused        one launch over both weights, for few rows
    auto         the fastest of them by a table measured per device; it never copies weights, and takes parallel
                 only inside a graph capture, where launches cost the host nothing

A GEMM library picks its kernel by size, so this op alone is not bitwise batch-invariant.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from polyfuse.spec._types import FLOATS, AttrSpec, Call, Cost, ErrorBound, OpSpec, OutputSpec, TensorSpec
from polyfuse.spec._validate import fail, itemsize

NAME = "gdn_in_proj"
STRATEGIES = ("auto", "sequential", "parallel", "merged", "fused")


def _check(call: Call) -> None:
    if not call.dims["..."]:
        fail(NAME, "x", "at least 2 dimensions", 1)


def _cost(call: Call) -> Cost:
    d, size = call.dims, itemsize(call.dtypes["T"])
    rows, columns = prod(d["..."]), d["N1"] + d["N2"]
    read = (rows * d["hidden"] + columns * d["hidden"]) * size
    return Cost(read, rows * columns * size, 2 * rows * columns * d["hidden"])


_SUM_REASON = (
    "magnitude sum |x * w| + |bias|. Sums that round to nearest err up as often as down: vector lanes and matrix units "
    "stay within 8 roundings of it at any hidden size. 0 where all inputs are integers and the sum is below 2^24: then "
    "every partial sum is exact in float32"
)
# Products that a matrix unit adds to its accumulator at a time, at least. On an H200 sums of 2048 positive bfloat16
# products were off by 88 roundings of the sum, of which 128 are granted; sums of either sign by 6 of sum |x * w|.
PRODUCTS_PER_SUM = 16


def _accumulator_steps(names: Mapping[str, Any]) -> float:
    return names["hidden"] / PRODUCTS_PER_SUM


SPEC = OpSpec(
    name=NAME,
    version=1,
    summary="Two input projections of one activation, run one after the other, side by side, or as one.",
    formula=__doc__ or "",
    source="Transformers Qwen3NextGatedDeltaNet (in_proj_qkvz, in_proj_ba)",
    rows="...",
    tensors=(
        TensorSpec("x", ("...", "hidden"), FLOATS, "the activation; leading dimensions are rows", dtype_var="T"),
        TensorSpec("w_qkvz", ("N1", "hidden"), FLOATS, "weight of the large projection", dtype_var="T"),
        TensorSpec("w_ba", ("N2", "hidden"), FLOATS, "weight of the small projection", dtype_var="T"),
        TensorSpec("bias_qkvz", ("N1",), FLOATS, "bias of the large projection", dtype_var="T", optional=True),
        TensorSpec("bias_ba", ("N2",), FLOATS, "bias of the small projection", dtype_var="T", optional=True),
    ),
    attrs=(AttrSpec("strategy", "enum", "auto", "how the two products are run", STRATEGIES),),
    outputs=(
        OutputSpec("qkvz", ("...", "N1"), "T", "the large projection"),
        OutputSpec("ba", ("...", "N2"), "T", "the small projection"),
    ),
    errors=(
        ErrorBound(
            "accumulator",
            _accumulator_steps,
            "magnitude |x @ w.T + bias|: a matrix unit that truncates its accumulator errs in one direction, by one "
            "rounding of the running sum for each 16 products",
        ),
        ErrorBound("qkvz", 8, f"the error of the accumulator, and {_SUM_REASON}"),
        ErrorBound("ba", 8, f"the error of the accumulator, and {_SUM_REASON}"),
    ),
    edge_cases=(
        "No rows, hidden == 0 or a weight without rows: zero-size or zero (plus bias) results, without a launch.",
        "With strategy merged, outside torch.compile, the results are views of one buffer: rows are strided.",
    ),
    check=_check,
    core=("bfloat16-auto", "float32-auto", "lead_17-sequential"),
    cost=_cost,
)
