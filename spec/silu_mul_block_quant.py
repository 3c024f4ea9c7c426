"""`silu_mul_block_quant`: SiLU-and-multiply of a gated MLP, quantised block by block, in one pass.

A row has a gate and an up, each of width D. `x` holds the two side by side, [gate | up]; with `up=`, the gate alone:

    y      gate * sigmoid(gate) * up          in fp32, unrounded
    amax   max |y| over each group of group_size columns
    scale  amax / qmax, then min(scale, scale_ub) if given, then max(scale, scale_min)
    q      round(clamp(y / scale, -qmax, qmax))

    qmax       float8_e4m3fn 448, float8_e4m3fnuz 224, float8_e5m2 57344, int8 127
    scale_min  if not given, 1 / (qmax * 512); int8: 2**-23

With `scale_min=0` the scale stays as it is, and q = round(clamp(y / max(scale, 1e-12), -qmax, qmax)): a group of zeros
has scale 0 and q 0. Both bounds are the float32 nearest to the number given.

`limit=c` first clamps gate to at most c and up to [-c, c]. `materialize=True` rounds silu(gate), and then the
product, to x's dtype, so that replacing an unfused pair of ops changes no bit. With a ue8m0 scale format the
scale is rounded UP to a power of two and q is computed with that; group_size=32 with ue8m0 is MXFP8.
`reciprocal=True` puts amax * (1 / qmax) in place of amax / qmax, with 1 / qmax and then the product rounded to float32:
what PyTorch computes on a GPU for `amax / 448.0`.
Rounding is to nearest even, saturating at +-qmax.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from polyfuse.spec._types import FLOATS, AttrSpec, Call, Cost, ErrorBound, OpSpec, OutputSpec, TensorSpec
from polyfuse.spec._validate import fail, itemsize

NAME = "silu_mul_block_quant"

QMAX = {"float8_e4m3fn": 448.0, "float8_e4m3fnuz": 224.0, "float8_e5m2": 57344.0, "int8": 127.0}
SCALE_FORMATS = ("float32", "ue8m0", "ue8m0_packed")
SCALE_LAYOUTS = ("row_major", "col_major", "col_major_tma")
TMA_ALIGNMENT = 4  # elements of 4 bytes that make the 16 bytes a tensor-memory stride must divide by
LEAST_DIVISOR = 1e-12  # of y where scale_min is 0
LEAST_SCALE_MIN, LARGEST_SCALE_MIN = 2.0**-126, 2.0**127  # the least normal float32; the largest power of two


def scale_floor(quant_dtype: str, scale_min: float | None = None) -> float:
    """The least scale: `scale_min` or, if that is None, what keeps an all-zero group from dividing by zero."""
    if scale_min is not None:
        return scale_min
    return 2.0**-23 if quant_dtype == "int8" else 1.0 / (QMAX[quant_dtype] * 512.0)


def _check(call: Call) -> None:
    group = call.attrs["group_size"]
    halves, times = (1, "") if "up" in call.dtypes else (2, "2*")
    width = halves * call.dims["D"]
    if call.dims["D"] % group:
        fail(NAME, "x", f"a last dimension divisible by {times}group_size={halves * group}", width)
    lead = call.dims["..."]
    if not lead:
        fail(NAME, "x", "at least 2 dimensions", 1)
    if "num_rows" in call.dtypes and len(lead) != 2:
        fail(NAME, "x", f"shape [E, T, {times}D] with num_rows", [*lead, width])
    for name in ("scale_ub", "limit"):
        if call.attrs[name] is not None and not call.attrs[name] > 0:
            fail(NAME, name, "a number > 0", call.attrs[name])
    scale_min, scale_format = call.attrs["scale_min"], call.attrs["scale_format"]
    if scale_min == 0:
        if scale_format != "float32":
            fail(NAME, "scale_min", f"a number > 0 with scale_format={scale_format}", scale_min)
    elif scale_min is not None and not LEAST_SCALE_MIN <= scale_min <= LARGEST_SCALE_MIN:
        fail(NAME, "scale_min", "0 or a number from 2**-126 to 2**127", scale_min)


def _derive(call: Call) -> Mapping[str, Any]:
    lead, attrs = tuple(call.dims["..."]), call.attrs
    groups = call.dims["D"] // attrs["group_size"]
    columns = -(-groups // 4) if attrs["scale_format"] == "ue8m0_packed" else groups
    dtype = "int32" if attrs["scale_format"] == "ue8m0_packed" else "float32"
    experts = {"E": lead[0]} if "num_rows" in call.dtypes else {}
    masked = bool(experts)
    return {
        "G": columns,
        "quant_dtype": attrs["quant_dtype"],
        "scale_dtype": dtype,
        "scale_strides": scale_strides(lead, columns, attrs["scale_layout"], masked),
        **experts,
    }


def scale_strides(lead: tuple[Any, ...], columns: Any, layout: str, masked: bool) -> tuple[Any, ...] | None:
    """Element strides of the scales [..., columns]; `None` is contiguous.

    A column-major buffer is [columns, rows] over all leading rows, or one such buffer per expert; for the
    tensor-memory accelerator its rows are padded to a multiple of 4.
    """
    if layout == "row_major":
        return None
    inner = lead[1:] if masked else lead
    rows = prod(inner)
    if layout == "col_major_tma":
        rows = -(-rows // TMA_ALIGNMENT) * TMA_ALIGNMENT
    strides = [prod(inner[i + 1 :]) for i in range(len(inner))]
    return (*([columns * rows] if masked else []), *strides, rows)


def _cost(call: Call) -> Cost:
    rows, width = prod(call.dims["..."]), call.dims["D"]
    scales = rows * call.dims["G"] * 4
    return Cost(2 * rows * width * itemsize(call.dtypes["x"]), rows * width + scales, 10 * rows * width)


SPEC = OpSpec(
    name=NAME,
    version=2,
    summary="SiLU-and-multiply followed by block-wise FP8 or INT8 quantisation, in one pass over the activation.",
    formula=__doc__ or "",
    source=(
        "DeepSeek-V3, arXiv:2412.19437 (1 x 128 tiles); OCP Microscaling Formats v1.0 (MXFP8); gpt-oss (clamped SwiGLU)"
    ),
    rows="...",
    independent=True,
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
        TensorSpec(
            "num_rows",
            ("E",),
            ("int32",),
            "valid rows per expert, where `...` is [E, T]; rows past that are neither read nor written",
            optional=True,
        ),
    ),
    attrs=(
        AttrSpec("group_size", "int", 128, "columns that share a scale; divides D", minimum=1),
        AttrSpec("quant_dtype", "dtype", "float8_e4m3fn", "dtype of q", tuple(QMAX)),
        AttrSpec(
            "scale_format",
            "enum",
            "float32",
            "ue8m0: powers of two, as float32 or four exponent bytes per int32",
            SCALE_FORMATS,
        ),
        AttrSpec("scale_layout", "enum", "row_major", "memory layout of the scales", SCALE_LAYOUTS),
        AttrSpec("scale_ub", "float", None, "upper bound of a finite scale; > 0"),
        AttrSpec("scale_min", "float", None, "least scale; from 2**-126 to 2**127, or 0 (scale_format float32 only)"),
        AttrSpec("limit", "float", None, "clamp of gate from above and of up on both sides; > 0"),
        AttrSpec("materialize", "bool", False, "round silu(gate) and the product to x's dtype before quantising"),
        AttrSpec("reciprocal", "bool", False, "amax * (1 / qmax), each rounded to float32, in place of amax / qmax"),
    ),
    outputs=(
        OutputSpec("q", ("...", "D"), "quant_dtype", "quantised values"),
        OutputSpec("scale", ("...", "G"), "scale_dtype", "y is about q * scale", strides="scale_strides"),
    ),
    errors=(
        ErrorBound(
            "y",
            10,
            "magnitude |y| * (1 + max(-gate, 0)), as an exponential turns the rounding of its argument into a "
            "relative error and costs 2 ulp; 1 + exp, a division within 2 ulp and two products. A flushed result "
            "counts once, a flushed sigmoid |gate * up|, gate or silu |up|, and up |silu(gate)| times. With "
            "materialize the same on silu(gate), before its rounding; a subnormal up or y may then count as 0",
            flushes=1,
        ),
        ErrorBound(
            "scale",
            lambda names: 0 if names["reciprocal"] else 2,
            "the error of the largest |y|, and 2 for the division by qmax; a product with 1 / qmax has no choice. "
            "Rounded up to a power of two, nothing may push an exact quotient over one. A flushed scale counts as 0",
            flushes=1,
        ),
        ErrorBound(
            "q",
            3,
            "the errors of y and of scale, and 3 for y / scale; 0 where y is exact and scale a power of two: then "
            "nothing is rounded before q, ties included",
        ),
    ),
    edge_cases=(
        "NaN in a group: its scale is NaN and its q are NaN (int8: 0).",
        "amax is infinite: the scale is infinite whatever scale_ub says, q is NaN (int8: 0) where y is, else 0.",
        "sigmoid(gate) or silu(gate) below the normal float32 range may count as 0: with an infinite up, y is then "
        "infinite or NaN. With scale_min=0, so may a scale.",
        "y beyond float32 is infinite. ue8m0_packed writes exponent byte 255 for a NaN or infinite scale.",
        "Four exponent bytes per int32, the first group lowest; the bytes past the last group are 0.",
        "With up, the result is that of the two side by side in x. They may share memory.",
        "No rows, or D == 0: empty results, without a launch. num_rows beyond T counts as T, below 0 as 0.",
    ),
    core=(
        "float8_e4m3fn-float32-row_major",
        "float8_e4m3fn-ue8m0-row_major",
        "float8_e5m2-float32-row_major",
        "int8-float32-col_major",
        "float8_e4m3fn-ue8m0_packed-col_major_tma",
        "group_128-float32",
        "bfloat16-materialize_True-limit_0.75",
        "float16-materialize_False-limit_None",
        "float32-materialize_False-limit_None",
        "up-bfloat16-materialize_False",
        "experts-float32-row_major",
        "fill_decades-int8-float32",
        "fill_nan_some-float8_e4m3fn-float32",
        "scale_ub_10.0-float8_e4m3fn",
        "row_strided",
    ),
    check=_check,
    derive=_derive,
    cost=_cost,
)
