"""`pos_embed_interpolate`: resample a learned position-embedding table to every image's patch grid.

The table is a grid of NH rows by N columns of vectors, row-major. NH is `table_height`; without it, NH equals N.
For an image of `t` frames of `h x w` patches, patch (i, j) of each frame gets

    out = sum over taps (y, x) of  wy[i, y] * wx[j, x] * table[y * N + x]      (+ base)

where the taps and weights of an axis of `n` patches over `s` cells (h over NH, w over N) come from the exact source
coordinate

    align_corners=True    source = i * (s - 1) / (n - 1)          (0 when n == 1)
    align_corners=False   source = ((2 * i + 1) * s - n) / (2 * n)

split by integer division into `cell` (the floor) and `f` (the remainder, in [0, 1)):

    bilinear   taps cell, cell + 1             weights 1 - f, f
    bicubic    taps cell - 1 ... cell + 2      weights of the Keys kernel with a = -0.75; with g = 1 - f:
               a*f*g*g,  g*(1 + f - (a+2)*f*f),  f*(1 + g - (a+2)*g*g),  a*g*f*f

and a tap outside the table is moved to its border. For bilinear this equals clamping the source at 0.

Rows come image by image, frame by frame (all frames of an image are equal), and inside a frame in
spatial-merge order: (h/m, w/m, m, m). All arithmetic is fp32 or wider with one rounding at the end.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

from polyfuse.spec._types import (
    FLOATS,
    INTS,
    AttrSpec,
    Call,
    Cost,
    ErrorBound,
    OpSpec,
    OutputSpec,
    Step,
    TensorSpec,
)
from polyfuse.spec._validate import fail, itemsize

NAME = "pos_embed_interpolate"

_BOUND_REASON = (
    "magnitude is sum of (|wy| + |wx|) * |table| over the taps, + |base|, because a 1-D weight is known to "
    "an absolute error: bilinear 4 (a division within 2 ulp) + 1 (1 - f); bicubic 12 (the same through the "
    "cubic's products). Then 1 for the product of weights and of value, half a step per accumulated tap "
    "(|wy*wx| <= (|wy| + |wx|) / 2 there), 1 for base. Each step, the value and base may flush a subnormal: 2^-126. "
    "Where every weight is 0 or 1, and the sum with base is a float32 number, nothing is rounded: the bound is 0"
)


def table_sides(rows: int, table_height: int | None) -> tuple[int, int]:
    """NH and N of a table [rows, D], rows and columns of its grid."""
    height = isqrt(rows) if table_height is None else table_height
    return height, rows // height


def _steps(names: Mapping[str, Any]) -> float:
    return 10 if names["mode"] == "bilinear" else 24


def _flushes(names: Mapping[str, Any]) -> float:
    return _steps(names) + 2


def _check(call: Call) -> None:
    merge, columns = call.attrs["merge_size"], call.dims["N"]
    longest = max(columns, call.attrs["table_height"] or columns)
    grid = call.host.get("grid_thw")
    if columns == 0:
        fail(NAME, "table", "at least one row", "[0, D]")
    if grid is None:
        return
    for i, (t, h, w) in enumerate(grid):
        argument = f"grid_thw[{i}]"
        if (t, h, w) == (0, 0, 0) and call.attrs["out_rows"] is not None:
            continue
        if min(t, h, w) < 1:
            fail(NAME, argument, "t, h, w >= 1", [t, h, w])
        if h % merge or w % merge:
            fail(NAME, argument, f"h and w divisible by merge_size={merge}", [t, h, w])
        if 2 * longest * (max(h, w) + 1) >= 2**31:
            fail(NAME, argument, f"2*max(NH, N)*max(h, w) below 2**31 with max(NH, N)={longest}", [t, h, w])


def _derive(call: Call) -> Mapping[str, Any]:
    grid, out_rows = call.host.get("grid_thw"), call.attrs["out_rows"]
    total = None if grid is None else sum(t * h * w for t, h, w in grid)
    if out_rows is not None and total is not None and total > out_rows:
        fail(NAME, "out_rows", f"at least the {total} rows of grid_thw", out_rows)
    default = call.dtypes.get("base", call.dtypes["table"])
    return {"rows": total if out_rows is None else out_rows, "out_dtype": call.attrs["out_dtype"] or default}


def _cost(call: Call) -> Cost:
    taps = 4 if call.attrs["mode"] == "bilinear" else 16
    rows, columns, width = call.dims["rows"], call.dims["N"], call.dims["D"]
    cells = columns * (call.attrs["table_height"] or columns)
    read = min(cells, taps * rows) * width * itemsize(call.dtypes["table"])
    if "base" in call.dtypes:
        read += rows * width * itemsize(call.dtypes["base"])
    return Cost(read, rows * width * itemsize(call.dtypes["out_dtype"]), 2 * taps * rows * width)


EXAMPLE = """
table = torch.randn(48 * 48, 64)  # a square grid of 48 x 48
grids = [[1, 32, 32], [2, 24, 38]]  # frames, rows and columns of patches: an image, and a video of two frames
rows = polyfuse.pos_embed_interpolate(table, grids)
print(tuple(rows.shape))
"""
PRINTED = "(2848, 64)"

SPEC = OpSpec(
    name=NAME,
    version=2,
    summary="Resample a learned position-embedding table to every image's patch grid.",
    formula=__doc__ or "",
    source=(
        "Qwen3-VL vision tower; Transformers `get_vision_interpolation_indices_and_weights`; "
        "R. Keys, Cubic convolution interpolation, IEEE TASSP 29(6), 1981"
    ),
    example=(EXAMPLE, PRINTED),
    rows="I",
    independent=True,
    tensors=(
        TensorSpec(
            "table",
            ("table_height*N if table_height else N*N", "D"),
            FLOATS,
            "the learned table, row-major over its grid of NH rows and N columns",
        ),
        TensorSpec(
            "grid_thw",
            ("I", "3"),
            INTS,
            "per image (frames, patch rows, patch columns), >= 1, rows and columns divisible by merge_size; "
            "a host sequence, or an integer tensor on the table's device. With out_rows, (0, 0, 0) is an unused "
            "image, and a tensor is not read back to the host",
            host_unless="out_rows",
        ),
        TensorSpec("base", ("rows", "D"), FLOATS, "added to the interpolated rows before rounding", optional=True),
    ),
    attrs=(
        AttrSpec("merge_size", "int", 2, "side of a spatial-merge block, in patches", minimum=1),
        AttrSpec("mode", "enum", "bilinear", "interpolation kernel", ("bilinear", "bicubic")),
        AttrSpec("align_corners", "bool", True, "which source coordinate, as in torch.nn.functional.interpolate"),
        AttrSpec("out_dtype", "dtype", None, "result dtype; None is base's, else table's", FLOATS),
        AttrSpec("out_rows", "int", None, "rows of the result; those past the real total are zero", minimum=0),
        AttrSpec("table_height", "int", None, "rows of the table's grid, NH; None for a square table", minimum=1),
    ),
    outputs=(OutputSpec("out", ("rows", "D"), "out_dtype", "the embeddings, in spatial-merge order"),),
    errors=(ErrorBound("out", _steps, _BOUND_REASON, _flushes),),
    edge_cases=(
        "A tap of zero weight is not read: a NaN or Inf there does not reach the result.",
        "Where the absolute values of the weighted taps and of base sum up beyond float32, the result is undefined.",
        "Padding rows (out_rows) are zero, whatever base holds there.",
        "A grid tensor with out_rows cannot be checked without reading it back. If one of its images is neither "
        "valid nor (0, 0, 0), or the rows do not fit into out_rows, every element of the result is NaN.",
        "A table of 16 x 36 has as many rows as one of 24 x 24: without table_height it is read as the square.",
        "D == 0 or no rows: an empty result, without a launch.",
    ),
    core=(
        "mixed-bilinear-corners",
        "video-bicubic-half_pixel",
        "upsample-bilinear-half_pixel",
        "downsample-bicubic-corners",
        "dtypes-bfloat16-out_default-base_bfloat16",
        "dtypes-float16-out_default-base_none",
        "dtypes-float32-out_bfloat16-base_none",
        "padded-bilinear-grid_tensor-base",
        "merge_1-corners",
        "table_16x36-bilinear-corners",
        "row_strided",
        "column_strided",
        "many_images",
        "fill_nan_some-bilinear",
    ),
    check=_check,
    derive=_derive,
    cost=_cost,
    steps=(
        Step("taps and weights of each patch", ("grid_thw",)),
        Step("weighted sum of 4 or 16 vectors of the table", ("table",)),
        Step("add base, round once", ("base",), ("out",)),
    ),
)
