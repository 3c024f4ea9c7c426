"""What the covering cases of `pos_embed_interpolate` vary."""

from collections.abc import Mapping
from typing import Any

from polyfuse.conformance.plan import Plan
from polyfuse.spec import SpecError

# Frames, rows and columns of each image, in blocks that are merged.
_GRIDS = {
    "mixed": ((1, 4, 3), (2, 2, 2), (1, 1, 10)),
    "one_block": ((1, 1, 1),),
    "points": ((1, 3, 3),),
    "video": ((5, 2, 3),),
    "twelve": tuple((1 + i % 2, 1 + i % 5, 1 + i % 3) for i in range(12)),
    "seventy": ((1, 1, 1),) * 70,
    "tall": ((1, 33, 1),),
    "1088_rows": ((1, 17, 16),),
}
# The height, if it is given, and the columns of the table, and D.
_TABLES = (
    *((None, 6, 24), (None, 5, 0), (None, 5, 1), (None, 1, 8), (None, 9, 31), (None, 4, 33), (None, 7, 64)),
    *((3, 5, 72), (16, 36, 16), (1, 7, 128), (7, 1, 129), (6, 6, 2), (None, 48, 8), (2, 3, 1025)),
)
_PADDING = {"none": None, "exact": 0, "padded": 37}


def _case(chosen: Mapping[str, Any]) -> Mapping[str, Any]:
    height, columns, width = chosen["table_size"]
    merge, more = chosen["merge_size"], _PADDING[chosen["padding"]]
    grid = tuple((t, h * merge, w * merge) for t, h, w in _GRIDS[chosen["grid"]])
    rows = sum(t * h * w for t, h, w in grid)
    if chosen["unused"]:
        if more is None:
            raise SpecError("unused images without out_rows")
        grid = (*grid[:1], (0, 0, 0), *grid[1:], (0, 0, 0))
    form = chosen["grid_form"]
    return {
        "dims": {"N": columns, "D": width},
        "attrs": {"table_height": height, "out_rows": None if more is None else rows + more},
        "host": {"grid_thw": grid},
        "as_tensor": () if form == "host" else ("grid_thw",),
        "dtypes": {"grid_thw": "int64" if form == "host" else form},
    }


_LAYOUTS = "contiguous row_strided odd_strided column_strided one_of_three second_half every_other misaligned offset"

PLAN = Plan(
    sizes={
        "table_size": _TABLES,
        "grid": tuple(_GRIDS),
        "padding": tuple(_PADDING),
        "unused": (False, True),
        "grid_form": ("host", "int32", "int64"),
    },
    blank={"table_size": tuple(size for size in _TABLES if size[2] == 0)},
    case=_case,
    attrs={"merge_size": (2, 1, 3)},
    fills={
        "table": "normal zeros signed_zeros nan_one nan_row inf_one largest huge subnormal tiny integers odd_halves "
        "one_hot equal",
        "base": "normal zeros signed_zeros nan_one nan_tail inf_one largest subnormal integers",
    },
    layouts={"table": f"{_LAYOUTS} expanded", "base": f"{_LAYOUTS} expanded expanded_last"},
)
