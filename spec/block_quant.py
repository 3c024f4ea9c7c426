"""`block_quant`: an activation of any kind, quantised block by block, in one pass.

y      x in fp32, as it is
"""

from collections.abc import Mapping
from math import frexp, isfinite, prod
from typing import Any, NamedTuple

from polyfuse.spec._types import (
    FLOATS,
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

NAME = "block_quant"

FLOAT4 = "float4_e2m1"
QMAX = {"float8_e4m3fn": 448.0, "float8_e4m3fnuz": 224.0, "float8_e5m2": 57344.0, "int8": 127.0, FLOAT4: 6.0}
SCALE_FORMATS = ("float32", "ue8m0", "ue8m0_packed", "e4m3")
SCALE_LAYOUTS = ("row_major", "col_major", "col_major_tma", "swizzled_128x4")
LARGEST_E4M3 = 448.0  # that a scale of format e4m3 can be
TMA_ALIGNMENT = 4  # elements of 4 bytes that make the 16 bytes a tensor-memory stride must divide by
SWIZZLED_ROWS, SWIZZLED_COLUMNS = 128, 4  # of the blocks of layout swizzled_128x4
LEAST_DIVISOR = 1e-12  # of y where scale_min is 0
LEAST_SCALE_MIN, LARGEST_SCALE_MIN = 2.0**-126, 2.0**127  # the least normal float32; the largest power of two

# What every quantising op does with its y. Each op's formula says first what y is.
QUANTISER = """
Each row of y, of D columns, is quantised in groups of group_size columns, of which the last may have fewer:

    amax   max |y| over the group
    scale  amax / qmax, then min(scale, scale_ub) if given, then max(scale, scale_min)
    q      round(clamp(y / scale, -qmax, qmax))

    qmax       float8_e4m3fn 448, float8_e4m3fnuz 224, float8_e5m2 57344, int8 127, float4_e2m1 6
    scale_min  if not given, 1 / (qmax * 512); int8: 2**-23; with a ue8m0 scale format 2**-126

With `scale_min=0` the scale stays as it is, and q = round(clamp(y / max(scale, 1e-12), -qmax, qmax)): a group of zeros
has scale 0 and q 0. Both bounds are the float32 nearest to the number given. `reciprocal=True` puts amax * (1 / qmax)
in place of amax / qmax, with 1 / qmax and then the product rounded to float32: what PyTorch computes on a GPU for
`amax / 448.0`. Rounding is to nearest even, saturating at +-qmax.

scale_format says what a scale is:

    float32       as it is
    ue8m0         rounded UP to a power of two before q is computed with it, and stored as float32. The exponent is that
                  of the Microscaling formats in their rounding-up mode, RCEIL in torchao: group_size=32 with it is
                  MXFP8, and with quant_dtype="float4_e2m1" MXFP4
    ue8m0_packed  the same, stored as four exponent bytes in an int32, the first group lowest
    e4m3          of float4_e2m1 only, NVFP4 with group_size=16: y is about q * scale * global_scale, where
                  scale = float8_e4m3fn(min(amax / (6 * global_scale), 448)), and q = round(y / (scale * global_scale)),
                  which is 0 where scale is. global_scale is 1 if it is not given

scale_layout says where it lies, for T rows (leading dimensions flattened) of G = ceil(D / group_size) groups:

    row_major       [T, G]
    col_major       the same as columns of a buffer [G, T]
    col_major_tma   the same, T padded to 16 bytes
    swizzled_128x4  a byte a scale, a ue8m0 one its exponent: an array [ceil(T / 128) * 128, ceil(G / 4) * 4] in the
                    order of memory, in which the scale of row r and group c is byte
                    ((r // 128) * ceil(G / 4) + c // 4) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4

float4_e2m1 puts two numbers into a byte, the first in the low half.

Some rows only: `num_rows` [E] says how many rows of each expert of [E, T, ...] are valid. `expert_ends` [E] is for rows
of experts behind one another: expert e owns the rows from align(expert_ends[e - 1]), 0 for the first, up to
expert_ends[e], exclusive; align rounds up to a multiple of expert_alignment, and an expert that would end before it
begins is empty. The ends do not decrease. Other rows are neither read nor written.

`fill` is what every scale holds that was allocated and belongs to no valid row or group: of other rows, of the padding
of a layout up to its last element, of the unused bytes of the last int32. Without it such scales of rows are not
written, bytes past the last group are 0, and a swizzled array holds 0 wherever it holds no scale.
"""


class ScaleForm(NamedTuple):
    """The array of scales of a call: its shape, dtype and element strides (`None` is contiguous)."""

    shape: tuple[Any, ...]
    dtype: str
    strides: tuple[Any, ...] | None


def scale_floor(quant_dtype: str, scale_min: float | None, scale_format: str) -> float:
    """The least scale: `scale_min` or, if that is None, what keeps an all-zero group from dividing by zero."""
    if scale_min is not None:
        return scale_min
    if scale_format != "float32":
        return LEAST_SCALE_MIN
    return 2.0**-23 if quant_dtype == "int8" else 1.0 / (QMAX[quant_dtype] * 512.0)


def scale_form(
    lead: tuple[Any, ...], width: Any, group_size: int, scale_format: str, layout: str, masked: bool
) -> ScaleForm:
    """The array of scales of rows [*lead, width], per entry of the first dimension if `masked`."""
    groups = -(-width // group_size)
    if layout == "swizzled_128x4":
        experts, rows = (lead[:1], prod(lead[1:])) if masked else ((), prod(lead))
        shape = (*experts, _up(rows, SWIZZLED_ROWS), _up(groups, SWIZZLED_COLUMNS))
        return ScaleForm(shape, "uint8" if scale_format == "ue8m0" else "float8_e4m3fn", None)
    columns = -(-groups // 4) if scale_format == "ue8m0_packed" else groups
    dtype = {"ue8m0_packed": "int32", "e4m3": "float8_e4m3fn"}.get(scale_format, "float32")
    return ScaleForm((*lead, columns), dtype, scale_strides(lead, columns, layout, masked, itemsize(dtype)))


def scale_strides(
    lead: tuple[Any, ...], columns: Any, layout: str, masked: bool, size: int = 4
) -> tuple[Any, ...] | None:
    """Element strides of the scales [..., columns], of `size` bytes each; `None` is contiguous.

    A column-major buffer is [columns, rows] over all leading rows, or one such buffer per expert; for the
    tensor-memory accelerator its rows are padded to 16 bytes.
    """
    if layout == "row_major":
        return None
    inner = lead[1:] if masked else lead
    rows = prod(inner)
    if layout == "col_major_tma":
        rows = _up(rows, 4 * TMA_ALIGNMENT // size)
    strides = [prod(inner[i + 1 :]) for i in range(len(inner))]
    return (*([columns * rows] if masked else []), *strides, rows)


def _up(size: Any, multiple: int) -> Any:
    return -(-size // multiple) * multiple


def check_quantiser(call: Call, columns: str = "D") -> None:
    """Raise `SpecError` for what no quantising op accepts; `columns` is how its spec writes the columns of x."""
    op, attrs, lead = call.op.name, call.attrs, call.dims["..."]
    given = call.dtypes
    if not lead:
        fail(op, "x", "at least 2 dimensions", 1)
    if "num_rows" in given and len(lead) != 2:
        fail(op, "x", f"shape [E, T, {columns}] with num_rows", [*lead, call.dims["D"] * (2 if "*" in columns else 1)])
    if "expert_ends" in given:
        if "num_rows" in given:
            fail(op, "expert_ends", "None with num_rows", "both")
        if len(lead) != 1:
            fail(op, "x", f"shape [T, {columns}] with expert_ends", f"{len(lead) + 1} dimensions")
    elif attrs["expert_alignment"] != 1:
        fail(op, "expert_alignment", "1 without expert_ends", attrs["expert_alignment"])
    if attrs["quant_dtype"] == FLOAT4:
        if call.dims["D"] % 2:
            fail(op, "x", f"an even D with quant_dtype={FLOAT4}", call.dims["D"])
        if attrs["group_size"] % 2:
            fail(op, "group_size", f"an even number with quant_dtype={FLOAT4}", attrs["group_size"])
    _check_scales(op, attrs, given)


def _check_scales(op: str, attrs: Mapping[str, Any], given: Mapping[str, str]) -> None:
    scale_format, scale_min, scale_ub = attrs["scale_format"], attrs["scale_min"], attrs["scale_ub"]
    if scale_ub is not None and not scale_ub > 0:
        fail(op, "scale_ub", "a number > 0", scale_ub)
    if scale_min == 0:
        if scale_format != "float32":
            fail(op, "scale_min", f"a number > 0 with scale_format={scale_format}", scale_min)
    elif scale_min is not None and not LEAST_SCALE_MIN <= scale_min <= LARGEST_SCALE_MIN:
        fail(op, "scale_min", "0 or a number from 2**-126 to 2**127", scale_min)
    if scale_format == "e4m3":
        if attrs["quant_dtype"] != FLOAT4:
            fail(op, "quant_dtype", f"{FLOAT4} with scale_format=e4m3", attrs["quant_dtype"])
        for name, none in (("scale_ub", None), ("scale_min", None), ("reciprocal", False)):
            if attrs[name] is not none:
                fail(op, name, f"{none} with scale_format=e4m3", attrs[name])
    elif "global_scale" in given:
        fail(op, "scale_format", "e4m3 with global_scale", scale_format)
    if attrs["scale_layout"] == "swizzled_128x4" and scale_format not in ("ue8m0", "e4m3"):
        fail(op, "scale_format", "ue8m0 or e4m3 with scale_layout=swizzled_128x4", scale_format)
    _check_fill(op, scale_format, attrs["fill"])


def _check_fill(op: str, scale_format: str, fill: float | None) -> None:
    if fill is None:
        return
    if scale_format.startswith("ue8m0"):
        if not (LEAST_SCALE_MIN <= fill <= LARGEST_SCALE_MIN and frexp(fill)[0] == 0.5):
            fail(op, "fill", f"a power of two from 2**-126 to 2**127 with scale_format={scale_format}", fill)
    elif scale_format == "e4m3":
        if not 0 <= fill <= LARGEST_E4M3:
            fail(op, "fill", "a number from 0 to 448 with scale_format=e4m3", fill)
    elif not isfinite(fill):
        fail(op, "fill", "a finite number", fill)


def derive_quantiser(call: Call) -> dict[str, Any]:
    """The dimensions and dtypes of q and scale."""
    lead, width, attrs = tuple(call.dims["..."]), call.dims["D"], call.attrs
    four_bit, masked = attrs["quant_dtype"] == FLOAT4, "num_rows" in call.dtypes
    form = scale_form(lead, width, attrs["group_size"], attrs["scale_format"], attrs["scale_layout"], masked)
    return {
        "Q": width // 2 if four_bit else width,
        "R": form.shape[:-1],
        "G": form.shape[-1],
        "quant_dtype": "uint8" if four_bit else attrs["quant_dtype"],
        "scale_dtype": form.dtype,
        "scale_strides": form.strides,
        **({"E": lead[0]} if masked else {}),
    }


def bytes_of_results(call: Call) -> int:
    """Bytes of q and scale."""
    q: int = prod(call.dims["..."]) * call.dims["Q"]
    scales: int = prod(call.dims["R"]) * call.dims["G"] * itemsize(call.dtypes["scale_dtype"])
    return q + scales


def _cost(call: Call) -> Cost:
    elements = prod(call.dims["..."]) * call.dims["D"]
    return Cost(elements * itemsize(call.dtypes["x"]), bytes_of_results(call), 4 * elements)


QUANTISER_TENSORS = (
    TensorSpec(
        "num_rows",
        ("E",),
        ("int32",),
        "valid rows per expert, where `...` is [E, T]; rows past that are neither read nor written",
        optional=True,
    ),
    TensorSpec(
        "expert_ends",
        ("E",),
        ("int32",),
        "where the rows of each expert end, where `...` is [T]; excludes num_rows",
        optional=True,
        boundaries=Boundaries(alignment="expert_alignment"),
    ),
    TensorSpec("global_scale", (), ("float32",), "a factor of all scales of format e4m3; > 0", optional=True),
)
QUANTISER_ATTRS = (
    AttrSpec("group_size", "int", 128, "columns that share a scale", minimum=1),
    AttrSpec("quant_dtype", "dtype", "float8_e4m3fn", "dtype of q; float4_e2m1 as pairs in uint8", tuple(QMAX)),
    AttrSpec("scale_format", "enum", "float32", "what a scale is, and its dtype", SCALE_FORMATS),
    AttrSpec("scale_layout", "enum", "row_major", "memory layout of the scales", SCALE_LAYOUTS),
    AttrSpec("scale_ub", "float", None, "upper bound of a finite scale; > 0"),
    AttrSpec("scale_min", "float", None, "least scale; from 2^-126 to 2^127, or 0 (scale_format float32 only)"),
    AttrSpec("reciprocal", "bool", False, "amax * (1 / qmax), each rounded to float32, in place of amax / qmax"),
    AttrSpec("expert_alignment", "int", 1, "a multiple of it is where each expert of expert_ends begins", minimum=1),
    AttrSpec("fill", "float", None, "what scales of no valid row or group hold; a power of two if they are ue8m0"),
)
QUANTISER_STEPS = (
    Step("the scale of each group, from its largest |y|", ("num_rows", "expert_ends", "global_scale"), ("scale",)),
    Step("y / scale, clamped and rounded", (), ("q",)),
)
QUANTISER_OUTPUTS = (
    OutputSpec("q", ("...", "Q"), "quant_dtype", "quantised values; Q is D, or D / 2 pairs of float4_e2m1"),
    OutputSpec(
        "scale",
        ("R", "G"),
        "scale_dtype",
        "y is about q * scale; R is `...`, and G the groups of a row, four to an int32, or as swizzled_128x4 says",
        strides="scale_strides",
    ),
)
QUANTISER_ERRORS = (
    ErrorBound(
        "scale",
        lambda names: 0 if names["reciprocal"] else 3 if names["scale_format"] == "e4m3" else 2,
        "the error of the largest |y|, and 2 for the division by qmax; a product with 1 / qmax has no choice. "
        "Rounded up to a power of two, nothing may push an exact quotient over one. 3 of e4m3 for the product with "
        "global_scale and the division. A flushed scale counts as 0",
        flushes=1,
    ),
    ErrorBound(
        "q",
        3,
        "the errors of y and of scale, and 3 for y / scale; 0 where y is exact and scale a power of two: then "
        "nothing is rounded before q, ties included. With e4m3, 3 for y / (scale * global_scale)",
    ),
)
QUANTISER_EDGE_CASES = (
    "NaN in a group: its scale is NaN and its q are NaN (int8, float4_e2m1: 0).",
    "amax is infinite: the scale is infinite whatever scale_ub says, q is NaN (int8, float4_e2m1: 0) where y is, "
    "else 0. An e4m3 scale is NaN there, and q 0.",
    "ue8m0_packed and swizzled_128x4 write exponent byte 255 for a NaN or infinite scale.",
    "No rows, or D == 0: empty results, without a launch. num_rows beyond T counts as T, below 0 as 0; an end "
    "beyond T as T.",
)

EXAMPLE = """
x = torch.randn(4, 512, dtype=torch.bfloat16)
q, scale = polyfuse.block_quant(x, group_size=32, scale_format="ue8m0")  # MXFP8
print(q.dtype, tuple(q.shape), tuple(scale.shape))
"""
PRINTED = "torch.float8_e4m3fn (4, 512) (4, 16)"

SPEC = OpSpec(
    name=NAME,
    version=1,
    summary="Block-wise FP8, FP4 or INT8 quantisation of any activation, in one pass.",
    formula=f"{__doc__ or ''}{QUANTISER}",
    source=(
        "DeepSeek-V3, arXiv:2412.19437 (1 x 128 tiles); OCP Microscaling Formats v1.0 (MXFP8, MXFP4); "
        "NVIDIA, NVFP4 (blocks of 16 with a second, global scale)"
    ),
    example=(EXAMPLE, PRINTED),
    rows="...",
    independent=True,
    groups=("E",),
    tensors=(
        TensorSpec("x", ("...", "D"), FLOATS, "what to quantise; leading dimensions are rows, with any strides"),
        *QUANTISER_TENSORS,
    ),
    attrs=QUANTISER_ATTRS,
    outputs=QUANTISER_OUTPUTS,
    errors=(
        ErrorBound("y", 0, "x is y, but a subnormal float32 may count as 0", flushes=1),
        *QUANTISER_ERRORS,
    ),
    edge_cases=QUANTISER_EDGE_CASES,
    core=(
        "float8_e4m3fn-float32-row_major",
        "float8_e4m3fn-ue8m0_packed-col_major_tma",
        "float8_e5m2-float32-col_major_tma",
        "fill_decades-int8",
        "bfloat16",
        "float16",
        "float32",
        "group_128",
        "mxfp8-swizzled",
        "mxfp4-ladder",
        "nvfp4-row_major",
        "experts",
        "expert_ends_4-float32",
        "fill_nan_some-float8_e4m3fn",
        "row_strided",
    ),
    check=check_quantiser,
    derive=derive_quantiser,
    cost=_cost,
    steps=(
        Step("a row in fp32", ("x",)),
        *QUANTISER_STEPS,
    ),
)
