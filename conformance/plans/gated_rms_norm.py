"""What the covering cases of `gated_rms_norm` vary."""

from polyfuse.conformance.plan import Plan

# Leading dimensions, and the width.
_SHAPES = (
    *(((5,), 64), ((), 72), ((0,), 8), ((3, 0), 8), ((4,), 0), ((1,), 1), ((2, 3), 2), ((5, 3, 2), 31), ((31,), 33)),
    *(((33,), 65), ((1, 4, 1, 2), 96), ((127,), 127), ((9, 16), 128), ((129,), 129), ((7,), 200), ((3,), 256)),
    *(((2,), 1000), ((1025,), 16), ((2, 1030, 1), 5)),
)

PLAN = Plan(
    sizes={"shape": _SHAPES},
    blank={"shape": tuple(shape for shape in _SHAPES if 0 in (*shape[0], shape[1]))},
    case=lambda chosen: {"dims": {"...": chosen["shape"][0], "V": chosen["shape"][1]}},
    attrs={"eps": (1e-6, 1e-60, 1e-12, 0.5), "weight_offset": (0.0, 1.0, -1.0)},
    fills={
        "x": "normal zeros signed_zeros nan_one nan_row inf_one largest huge subnormal tiny around_1e_3 large "
        "integers one_hot equal",
        "gate": "normal zeros signed_zeros nan_one inf_one negative_inf_one largest subnormal wide_line integers",
        "weight": "normal zeros nan_one inf_one largest subnormal near_one integers",
    },
    layouts={
        "x": "contiguous row_strided odd_strided column_strided sliced one_of_three second_half every_other misaligned "
        "offset expanded",
        "gate": "contiguous row_strided column_strided sliced one_of_three first_half every_other misaligned expanded "
        "expanded_last",
        "weight": "contiguous every_other misaligned second_half expanded_last",
    },
)
