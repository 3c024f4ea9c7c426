"""What the covering cases of all quantising ops vary."""

from collections.abc import Mapping
from typing import Any

from polyfuse.conformance.covering import ABSENT
from polyfuse.spec import SpecError
from polyfuse.spec.block_quant import FLOAT4

# Leading dimensions, D, and the columns that share a scale.
SHAPES = (
    *(((5,), 128, 32), ((0,), 64, 32), ((3,), 0, 32), ((1,), 21, 7), ((33,), 96, 96), ((3, 6), 160, 32)),
    *(((17,), 100, 48), ((4,), 6, 16), ((2, 65), 3, 1), ((3, 130), 48, 16), ((2, 2, 2), 512, 256), ((1025,), 8, 8)),
)
BLANK = tuple(shape for shape in SHAPES if 0 in (*shape[0], shape[1]))

# Dtypes of q with formats of scales: one factor, as an e4m3 scale is of four bits only, and global_scale is of e4m3.
_FORMATS = (
    *(("float8_e4m3fn", "float32"), ("float8_e4m3fnuz", "float32"), ("float8_e5m2", "float32"), ("int8", "float32")),
    *((FLOAT4, "float32"), ("float8_e4m3fn", "ue8m0"), ("int8", "ue8m0"), (FLOAT4, "ue8m0")),
    *(("float8_e4m3fn", "ue8m0_packed"), ("float8_e5m2", "ue8m0_packed"), (FLOAT4, "ue8m0_packed"), (FLOAT4, "e4m3")),
)
SIZES: Mapping[str, tuple[Any, ...]] = {"shape": SHAPES, "formats": _FORMATS}

ATTRS: Mapping[str, tuple[Any, ...]] = {
    "quant_dtype": (),
    "scale_format": (),  # both are of `formats`
    "scale_ub": (None, 1e-3, 10.0),
    "scale_min": (None, 0.0, 1e-12, 0.5, 2.0**-126),
    "expert_alignment": (1, 4),
    "fill": (None, 0.5, 4.0),
}
FILLS = {
    "x": "normal zeros signed_zeros nan_one nan_some nan_row inf_one inf_some largest huge subnormal tiny large "
    "decades ladder integers odd_halves one_hot equal",
    "num_rows": "row_counts zeros beyond below",
    "expert_ends": "expert_ends_4 expert_ends_1 zeros beyond",
    "global_scale": "a_thousandth equal",
}
LAYOUTS = {
    "x": "contiguous row_strided odd_strided column_strided one_of_three second_half every_other misaligned offset "
    "sliced expanded",
    "num_rows": "contiguous every_other misaligned",
    "expert_ends": "contiguous every_other misaligned",
    "global_scale": "contiguous misaligned",
}


def case(chosen: Mapping[str, Any]) -> Mapping[str, Any]:
    """The dimensions and attributes of a choice; there are 260 experts of many rows, which is more than one chunk."""
    lead, width, group = chosen["shape"]
    quant_dtype, scale_format = chosen["formats"]
    if chosen["num_rows"] != ABSENT and len(lead) != 2:
        raise SpecError("num_rows is of rows [E, T]")
    if chosen["expert_ends"] != ABSENT and len(lead) != 1:
        raise SpecError("expert_ends are of rows [T]")
    experts = 260 if lead[0] > 1000 else 4
    return {
        "dims": {"...": lead, "D": width, "E": lead[0] if chosen["expert_ends"] == ABSENT else experts},
        "attrs": {"group_size": group, "quant_dtype": quant_dtype, "scale_format": scale_format},
    }
