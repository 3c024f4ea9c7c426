"""`segment_attention`: softmax attention of every row of a packed batch over the rows of its own segment, not causal.

The rows lie one segment after the other: segment s is rows cu_seqlens[s] to cu_seqlens[s + 1], and may be empty. Per
head, for a row i and the rows j of its segment:

    score[i, j]    scale * sum over d of q[i, d] * k[j, d]
    weight[i, j]   exp(score[i, j]) / sum over j of exp(score[i, j])
    out[i]         sum over j of weight[i, j] * v[j]

`scale` is 1 / sqrt(dim) if it is not given. Scores, exponentials and sums are fp32 or wider, without overflow: the
largest score of a row is subtracted first. Of 16-bit arrays the exponentials may be rounded to their dtype before they
meet v, as matrix units need it. The result is rounded once.

No row depends on another segment: whatever that holds, NaN and infinity included.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from polyfuse.spec._types import (
    FLOATS,
    FP32_ROUNDOFF,
    FP32_TINY,
    INTS,
    AttrSpec,
    Boundaries,
    Call,
    Cost,
    ErrorBound,
    OpSpec,
    OutputSpec,
    Step,
    TensorSpec,
)
from polyfuse.spec._validate import fail, itemsize
from polyfuse.spec.gdn_in_proj import PRODUCTS_PER_SUM

NAME = "segment_attention"

# Of each 16-bit dtype: the unit roundoff, and half the distance of its subnormal numbers.
ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
HALF_STEP = {"float16": 2.0**-25}

DEVIATIONS = 3  # of a sum of many roundings, in units of the root of the sum of their squares


def _check(call: Call) -> None:
    scale = call.attrs["scale"]
    if scale is not None and not (scale > 0 and isfinite(scale)):
        fail(NAME, "scale", "a finite number > 0", scale)
    if call.dims["N"] < 1:
        fail(NAME, "cu_seqlens", "at least 1 element", call.dims["N"])


def _derive(call: Call) -> Mapping[str, Any]:
    """What rounding a weight to T costs, in the units of an error bound."""
    dtype = call.dtypes["T"]
    return {
        "weight_steps": ROUNDOFF.get(dtype, 0.0) / FP32_ROUNDOFF,
        "weight_flushes": HALF_STEP.get(dtype, FP32_TINY) / FP32_TINY,
    }


def _cost(call: Call) -> Cost:
    """Every array once; of the products those of segments as long as `max_seqlen` or the batch allow."""
    d = call.dims
    longest = d["rows"] if call.attrs["max_seqlen"] is None else min(d["rows"], call.attrs["max_seqlen"])
    size = d["rows"] * d["heads"] * d["dim"]
    moved = size * itemsize(call.dtypes["T"])
    return Cost(3 * moved + d["N"] * itemsize(call.dtypes["cu_seqlens"]), moved, 4 * size * longest)


def _score_accumulator_steps(names: Mapping[str, Any]) -> float:
    return names["dim"] / PRODUCTS_PER_SUM


EXAMPLE = """
q, k, v = torch.randn(3, 10, 2, 32)  # ten rows, two heads of 32
out = polyfuse.segment_attention(q, k, v, torch.tensor([0, 4, 10]))  # segments of four rows and of six
print(tuple(out.shape))
"""
PRINTED = "(10, 2, 32)"

SPEC = OpSpec(
    name=NAME,
    version=1,
    summary="Softmax attention of every row of a packed batch over its own segment.",
    formula=__doc__ or "",
    source=(
        "Vaswani et al., Attention Is All You Need, arXiv:1706.03762; Dao, FlashAttention-2, arXiv:2307.08691, whose "
        "variable-length form this is; Transformers Qwen3VLVisionAttention"
    ),
    example=(EXAMPLE, PRINTED),
    rows="rows",
    tensors=(
        TensorSpec("q", ("rows", "heads", "dim"), FLOATS, "queries; any strides", dtype_var="T"),
        TensorSpec("k", ("rows", "heads", "dim"), FLOATS, "keys; any strides", dtype_var="T"),
        TensorSpec("v", ("rows", "heads", "dim"), FLOATS, "values; any strides", dtype_var="T"),
        TensorSpec(
            "cu_seqlens",
            ("N",),
            INTS,
            "where each of the N - 1 segments begins, from 0, and the end",
            boundaries=Boundaries(starts=True),
        ),
    ),
    attrs=(
        AttrSpec("scale", "float", None, "what the scores are multiplied by, > 0; None is dim ** -0.5"),
        AttrSpec(
            "max_seqlen",
            "int",
            None,
            "no segment has more rows; None says nothing. It saves work where the segments are on the device",
            minimum=0,
        ),
    ),
    outputs=(OutputSpec("out", ("rows", "heads", "dim"), "T", "the mixed values"),),
    errors=(
        ErrorBound(
            "score_accumulator",
            _score_accumulator_steps,
            "magnitude |score|: a matrix unit that truncates its accumulator errs in one direction, by one rounding of "
            "the running sum for each 16 products",
        ),
        ErrorBound(
            "scores",
            4,
            "the error of the score's accumulator, and magnitude scale * sum |q * k|: a sum of dim products that "
            "rounds to nearest, the scale with its change of base, and their product. A flushed q or k counts |k| or "
            "|q| times. An error of a score is a relative error of its exponential",
            flushes=1,
        ),
        ErrorBound(
            "exponentials",
            5,
            "the error of the score, and relative, of magnitude 1 + the largest score of the row - the score: the "
            "difference is rounded, and an exponential is within 2 ulp. Exponentials and their sum err together: an "
            "error of one counts weight * |v - out| times",
        ),
        ErrorBound(
            "weights",
            lambda names: names["weight_steps"],
            "one rounding of each exponential to T: 2^-8 of bfloat16, 2^-11 of float16, nothing of float32. Magnitude "
            "sum |weight * v|, or 3 times the root of the sum of (weight * v)^2 if that is less: different weights "
            "round up as often as down, and that is seven standard deviations. A flushed exponential counts |v| times, "
            "and in float16 it is rounded to a multiple of 2^-24",
            flushes=lambda names: names["weight_flushes"],
        ),
        ErrorBound(
            "accumulator",
            0.5,
            "magnitude |out| times the number of rows in the segment: like terms that are added one after another may "
            "be rounded in one direction, each time by one rounding of the running sum, half of |out| on average",
        ),
        ErrorBound(
            "out",
            8,
            "the error of the weights and of the accumulator, and magnitude sum |weight * v|: sums that round to "
            "nearest stay within 8 roundings at any number of rows, the division by the sum of the exponentials "
            "included. A flushed result counts once, and so do flushed values, whose weights sum to 1",
            flushes=2,
        ),
    ),
    edge_cases=(
        "Rows past the last entry of cu_seqlens belong to no segment: their results are undefined, and whatever they "
        "hold reaches no other row.",
        "cu_seqlens is not checked and, except on a CPU, not read back to the host: its entries are taken to begin "
        "with 0, not to decrease, and to be within rows; no segment is taken to be longer than max_seqlen.",
        "No rows, no heads, or dim == 0: an empty result, without a launch. Empty segments have no rows to write.",
        "A NaN in q makes its row NaN in its head, one in k all rows of its segment in its head, one in v its column "
        "of these; it reaches no other segment.",
        "A score of infinity makes its row NaN. One of -infinity, or a sum |q * k| beyond float32, makes its row "
        "undefined. Infinities in v follow IEEE where their weights are not so small that they may be zero.",
        "Columns of v whose absolute values sum up beyond float32 in a segment are undefined there.",
        "Results are not bitwise independent of the batch around a segment: tiles may depend on the number of rows.",
    ),
    check=_check,
    derive=_derive,
    core=(
        "bfloat16-segments",
        "float32-segments",
        "float16-segments",
        "one_segment-dim_72",
        "one_segment-dim_128",
        "float32-dim_128",
        "int64",
        "one_of_three-bfloat16",
        "empty_around",
        "scale_2.0",
        "max_seqlen_24",
        "many_segments",
        "segment_nan-bfloat16-None",
        "trailing_nan",
    ),
    cost=_cost,
    steps=(
        Step("scores inside a segment: scale * q k^T", ("q", "k", "cu_seqlens")),
        Step("softmax over the segment"),
        Step("weighted sum of v", ("v",), ("out",)),
    ),
)
