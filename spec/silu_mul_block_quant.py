"""`silu_mul_block_quant`: SiLU-and-multiply of a gated MLP, quantised block by block, in one pass.

A row has a gate and an up, each of width D. `x` holds the two side by side, [gate | up], or with `interleaved=True` in
turn, gate, up, gate, up; with `up=`, it is the gate alone:

    y      gate * sigmoid(alpha * gate) * (up + up_offset)          in fp32, unrounded

`limit=c` first clamps gate to at most c and up to [-c, c]. With `limit_on="silu"` it clamps up so, and of the gate
gate * sigmoid(gate) to at most c in place of the gate itself; alpha must be 1. gpt-oss has alpha=1.702, up_offset=1 and
limit=7. `row_weight` multiplies every y of its row: router weights, applied before quantisation. alpha, up_offset and
limit are the float32 nearest to the number given.

`materialize=True` rounds what the plain PyTorch form rounds, to x's dtype, so that replacing unfused ops changes no
bit: silu(gate), or for another alpha alpha * gate, its sigmoid and the gate times that; up + up_offset, unless that is
up; the product; and the product with the row's weight. A clamp rounds nothing.
"""

from collections.abc import Mapping
from math import isfinite, prod
from typing import Any

from polyfuse.spec._types import FLOATS, AttrSpec, Call, Cost, ErrorBound, OpSpec, Step, TensorSpec
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

NAME = "silu_mul_block_quant"

LIMIT_ON = ("input", "silu")


def _check(call: Call) -> None:
    attrs, apart = call.attrs, "up" in call.dtypes
    check_quantiser(call, "D" if apart else "2*D")
    if attrs["interleaved"] and apart:
        fail(NAME, "interleaved", "False with up", True)
    if attrs["limit"] is not None and not attrs["limit"] > 0:
        fail(NAME, "limit", "a number > 0", attrs["limit"])
    for name in ("alpha", "up_offset"):
        if not isfinite(attrs[name]):
            fail(NAME, name, "a finite number", attrs[name])
    if attrs["limit_on"] == "silu":
        if attrs["limit"] is None:
            fail(NAME, "limit", "a number > 0 with limit_on=silu", None)
        if attrs["alpha"] != 1:
            fail(NAME, "alpha", "1 with limit_on=silu", attrs["alpha"])


def _cost(call: Call) -> Cost:
    rows, width = prod(call.dims["..."]), call.dims["D"]
    weights = rows * itemsize(call.dtypes["row_weight"]) if "row_weight" in call.dtypes else 0
    read = 2 * rows * width * itemsize(call.dtypes["x"]) + weights
    return Cost(read, bytes_of_results(call), 10 * rows * width)


def _steps(names: Mapping[str, Any]) -> float:
    return 10 + (names["alpha"] != 1) + (names["up_offset"] != 0)


EXAMPLE = """
x = torch.randn(4, 1024, dtype=torch.bfloat16)  # [gate | up]
q, scale = polyfuse.silu_mul_block_quant(x)
print(q.dtype, tuple(q.shape), tuple(scale.shape))
"""
PRINTED = "torch.float8_e4m3fn (4, 512) (4, 4)"

SPEC = OpSpec(
    name=NAME,
    version=3,
    summary="SiLU-and-multiply followed by block-wise FP8, FP4 or INT8 quantisation, in one pass over the activation.",
    formula=f"{__doc__ or ''}{QUANTISER}",
    source=(
        "DeepSeek-V3, arXiv:2412.19437 (1 x 128 tiles); OCP Microscaling Formats v1.0 (MXFP8, MXFP4); NVIDIA, NVFP4; "
        "gpt-oss (clamped SwiGLU)"
    ),
    example=(EXAMPLE, PRINTED),
    rows="...",
    independent=True,
    groups=("E",),
    tensors=(
        TensorSpec(
            "x",
            ("...", "D if up else 2*D"),
            FLOATS,
            "[gate | up], or the gate where up is given; leading dimensions are rows",
            dtype_var="T",
        ),
        TensorSpec(
            "up",
            ("...", "D"),
            FLOATS,
            "the up of each row, with strides of its own; x and up may each be columns of a wider array",
            dtype_var="T",
            optional=True,
        ),
        TensorSpec("row_weight", ("...",), FLOATS, "a factor of each row's y", optional=True),
        *QUANTISER_TENSORS,
    ),
    attrs=(
        AttrSpec("interleaved", "bool", False, "columns of x are gate, up, gate, up"),
        AttrSpec("alpha", "float", 1.0, "factor of the gate inside the sigmoid"),
        AttrSpec("up_offset", "float", 0.0, "added to up, after its clamp"),
        AttrSpec("limit", "float", None, "clamp of gate from above and of up on both sides; > 0"),
        AttrSpec("limit_on", "enum", "input", "whether limit clamps the gate, or gate * sigmoid(gate)", LIMIT_ON),
        AttrSpec("materialize", "bool", False, "round to x's dtype what unfused ops round, before quantising"),
        *QUANTISER_ATTRS,
    ),
    outputs=QUANTISER_OUTPUTS,
    errors=(
        ErrorBound(
            "y",
            _steps,
            "magnitude |y| * (1 + max(-alpha * gate, 0)), as an exponential turns the rounding of its argument into a "
            "relative error and costs 2 ulp; 1 + exp, a division within 2 ulp and two products; 1 more for an "
            "alpha that is not 1, and for an up_offset that is not 0. Where limit_on=silu clamps, magnitude |y|. "
            "A flushed result counts once, a flushed sigmoid |gate * (up + up_offset)|, gate or silu |up + up_offset|, "
            "and up |silu| times. With materialize the same on gate * sigmoid(alpha * gate), or on the sigmoid of the "
            "rounded alpha * gate, before its rounding; a subnormal up or y may then count as 0",
            flushes=1,
        ),
        ErrorBound("terms", 1, "with materialize, alpha * gate and up + up_offset before their own roundings"),
        ErrorBound(
            "weighted",
            1,
            "magnitude |y|: the product with row_weight, which multiplies the error of y. A flushed one counts as 0",
            flushes=1,
        ),
        *QUANTISER_ERRORS,
    ),
    edge_cases=(
        *QUANTISER_EDGE_CASES,
        "sigmoid or silu of a gate below the normal float32 range may count as 0: with an infinite up, y is then "
        "infinite or NaN. With scale_min=0, so may a scale.",
        "y beyond float32 is infinite.",
        "With up, the result is that of the two side by side in x. They may share memory.",
    ),
    core=(
        "float8_e4m3fn-float32-row_major",
        "float8_e4m3fn-ue8m0_packed-col_major_tma",
        "float8_e5m2-float32-row_major",
        "int8-float32-col_major",
        "group_128-float32",
        "bfloat16-materialize_True-limit_0.75",
        "float16-materialize_False-limit_None",
        "float32-materialize_False-limit_None",
        "up-bfloat16-materialize_False",
        "gpt_oss-bfloat16-materialize_True",
        "experts-float32-row_major",
        "fill_nan_some-float8_e4m3fn-float32",
        "mxfp8-swizzled",
        "expert_ends_4-float32",
        "row_strided",
    ),
    check=_check,
    derive=derive_quantiser,
    cost=_cost,
    steps=(
        Step("SiLU of the gate, times up", ("x", "up")),
        Step("times the row's weight", ("row_weight",)),
        *QUANTISER_STEPS,
    ),
)
