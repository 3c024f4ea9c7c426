"""What the covering cases of `silu_mul_block_quant` vary."""

from collections.abc import Mapping
from typing import Any

from polyfuse.conformance.plan import Plan

# Leading dimensions, D, and the columns that share a scale.
_SHAPES = (
    *(((5,), 128, 32), ((0,), 64, 32), ((3,), 0, 32), ((1,), 21, 7), ((33,), 96, 96), ((3, 6), 160, 32)),
    *(((4, 2), 64, 64), ((2, 2, 2), 48, 16), ((2, 65), 3, 1), ((7,), 512, 256), ((129,), 32, 32), ((9, 16), 128, 128)),
    *(((1025,), 8, 8), ((2,), 1040, 16)),
)


def _case(chosen: Mapping[str, Any]) -> Mapping[str, Any]:
    lead, width, group = chosen["shape"]
    return {"dims": {"...": lead, "D": width, "E": lead[0]}, "attrs": {"group_size": group}}


PLAN = Plan(
    sizes={"shape": _SHAPES},
    blank={"shape": tuple(shape for shape in _SHAPES if 0 in (*shape[0], shape[1]))},
    case=_case,
    attrs={
        "scale_ub": (None, 1e-3, 10.0),
        "scale_min": (None, 0.0, 1e-12, 0.5, 2.0**-126),
        "limit": (None, 0.75, 7.0),
    },
    fills={
        "x": "normal zeros signed_zeros nan_one nan_row inf_one inf_some largest huge subnormal tiny large decades "
        "outliers integers odd_halves one_hot equal",
        "up": "normal zeros signed_zeros nan_one inf_one largest subnormal integers one_hot",
        "num_rows": "row_counts zeros beyond below",
    },
    layouts={
        "x": "contiguous row_strided odd_strided column_strided one_of_three second_half every_other misaligned offset "
        "sliced expanded",
        "up": "contiguous row_strided odd_strided column_strided one_of_three every_other misaligned expanded",
        "num_rows": "contiguous every_other misaligned",
    },
)
