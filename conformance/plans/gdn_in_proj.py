"""What the covering cases of `gdn_in_proj` vary."""

from collections.abc import Mapping
from typing import Any

from polyfuse.conformance.covering import ABSENT
from polyfuse.conformance.plan import Plan
from polyfuse.spec import SpecError

_WEIGHTS = ("w_qkvz", "w_z", "w_ba", "w_a")  # in the order in which merged has them

# Leading dimensions, hidden, N1, NZ, N2, NA. More than 16 rows have a hidden size that is a multiple of 32: of others
# oneDNN's bfloat16 products on a CPU read past a row's end, times zero, and a NaN there reaches that row.
_SHAPES = (
    *(((5,), 64, 96, 40, 8, 6), ((0,), 16, 8, 4, 2, 2), ((1,), 50, 37, 19, 5, 1), ((2, 3), 2, 1, 1, 1, 1)),
    *(((4,), 0, 5, 3, 2, 1), ((17,), 32, 33, 31, 7, 9), ((33,), 160, 65, 63, 16, 8), ((3,), 130, 0, 5, 0, 3)),
    *(((2, 64), 32, 127, 129, 32, 32), ((1, 1, 7), 200, 128, 0, 64, 0), ((65,), 64, 257, 3, 1, 33)),
    *(((1025,), 32, 9, 4, 3, 2), ((4,), 1024, 32, 16, 8, 8)),
)


def _case(chosen: Mapping[str, Any]) -> Mapping[str, Any]:
    lead, hidden, *widths = chosen["shape"]
    given = [name for name in _WEIGHTS if chosen.get(name) != ABSENT]
    sizes = dict(zip(_WEIGHTS, widths, strict=True))
    if chosen["strategy"] == "merged" and any(chosen[f"{name}.layout"] != "contiguous" for name in given):
        raise SpecError("strided weights with strategy merged: they are not one matrix")
    return {
        "dims": {
            "...": lead,
            "hidden": hidden,
            "N1": sizes["w_qkvz"],
            "NZ": sizes["w_z"],
            "N2": sizes["w_ba"],
            "NA": sizes["w_a"],
            "M1": sum(sizes[name] for name in given if name in ("w_qkvz", "w_z")),
            "M2": sum(sizes[name] for name in given if name in ("w_ba", "w_a")),
        },
        "stacked": tuple(given) if chosen["strategy"] == "merged" else (),
    }


_VALUES = "normal integers odd_halves zeros nan_one inf_one subnormal"
_MATRIX = "contiguous row_strided odd_strided column_strided misaligned every_other"

PLAN = Plan(
    sizes={"shape": _SHAPES},
    blank={"shape": tuple(shape for shape in _SHAPES if 0 in shape[0] or shape[1] == 0)},
    case=_case,
    read=tuple(f"{name}.layout" for name in _WEIGHTS),
    fills={
        "x": f"{_VALUES} signed_zeros nan_row one_hot large tiny equal",
        **dict.fromkeys(_WEIGHTS, _VALUES),
        "bias_qkvz": "normal integers zeros nan_one inf_one subnormal",
        "bias_ba": "normal integers zeros nan_one inf_one",
    },
    layouts={
        "x": f"{_MATRIX} one_of_three second_half offset sliced expanded expanded_last",
        **dict.fromkeys(_WEIGHTS, f"{_MATRIX} expanded"),
        "bias_qkvz": "contiguous every_other misaligned expanded_last",
        "bias_ba": "contiguous every_other misaligned expanded_last",
    },
)
