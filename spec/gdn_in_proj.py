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

from collections.abc import Iterator
from itertools import product
from math import prod

from polyfuse.spec._types import FLOATS, AttrSpec, Call, Case, Cost, ErrorBound, OpSpec, OutputSpec, TensorSpec
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


def _cases() -> Iterator[Case]:
    small = {"...": (5,), "hidden": 64, "N1": 96, "N2": 8}
    for dtype, strategy in product(FLOATS, STRATEGIES):
        yield Case(f"{dtype}-{strategy}", small, {"strategy": strategy}, {"T": dtype})
    for strategy in STRATEGIES:
        attrs, both = {"strategy": strategy}, ("bias_qkvz", "bias_ba")
        yield Case(f"bias-{strategy}", small, attrs, {"T": "bfloat16"}, present=both)
        for lead in ((0,), (1,), (17,), (2, 3)):
            dims = {**small, "...": lead}
            yield Case(f"lead_{'x'.join(map(str, lead))}-{strategy}", dims, attrs, {"T": "bfloat16"})
        odd = {"...": (3,), "hidden": 50, "N1": 37, "N2": 5}
        yield Case(f"odd_sizes-{strategy}", odd, attrs, {"T": "float32"})
        layout = {"x": "row_strided", "w_qkvz": "row_strided", "w_ba": "column_strided"}
        yield Case(f"strided-{strategy}", small, attrs, {"T": "bfloat16"}, layout=layout)
        yield Case(f"nan_some-{strategy}", small, attrs, {"T": "bfloat16"}, fill={"x": "nan_some"})
    yield Case("one_bias", small, {}, {"T": "float32"}, present=("bias_ba",))
    yield Case("empty_ba", {**small, "N2": 0}, {}, {"T": "float32"})
    yield Case("wide", {"...": (4,), "hidden": 512, "N1": 256, "N2": 64}, {}, {"T": "bfloat16"})
    # 180,224 rows: more than 2**31 elements. Only a kernel of our own promises equal rows.
    dims = {"...": (704,), "hidden": 64, "N1": 12288, "N2": 64}
    yield Case("over_2_31", dims, {"strategy": "fused"}, {"T": "bfloat16"}, repeat=256)


_BOUND = (
    "magnitude sum |x| |w| + |bias|. No implementation adds more than a row's hidden/8 products one after another "
    "(vector lanes and matrix units sum in blocks of 8 or more); 8 for the blocks' own sum and the bias"
)

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
    errors=tuple(ErrorBound(name, lambda names: names["hidden"] / 8 + 8, _BOUND) for name in ("qkvz", "ba")),
    edge_cases=(
        "No rows, hidden == 0 or a weight without rows: zero-size or zero (plus bias) results, without a launch.",
        "With strategy merged, outside torch.compile, the results are views of one buffer: rows are strided.",
    ),
    check=_check,
    derive=lambda call: {},
    cost=_cost,
    cases=lambda: tuple(_cases()),
)
