"""What the covering cases of `gdn_conv_prep` vary."""

from collections.abc import Mapping
from typing import Any

from polyfuse.conformance.covering import ABSENT
from polyfuse.conformance.plan import Plan

# Where sequences end, and the rows past the last one.
_SEQUENCES = {
    "mixed": ((0, 2, 2, 7, 10, 11, 17), 3),
    "no_rows": ((0, 0, 0), 0),
    "all_empty": ((0, 0, 0, 0), 2),
    "first_and_last_empty": ((0, 0, 5, 5), 0),
    "single_rows": (tuple(range(10)), 0),
    "around_32": ((0, 31, 63, 96), 0),
    "around_64": ((0, 63, 128), 1),
    "many": ((0, *(3 * i + 1 for i in range(33))), 0),
}
# Key heads, value heads, K and V.
_HEADS = ((2, 4, 16, 8), (1, 1, 8, 8), (2, 6, 5, 7), (1, 3, 1, 1), (3, 3, 24, 40), (2, 1, 33, 16), (1, 2, 128, 64))
_INDICES = "shuffled none shuffled_beyond"


def _case(chosen: Mapping[str, Any]) -> Mapping[str, Any]:
    ends, past = _SEQUENCES[chosen["sequences"]]
    heads, heads_v, key, value = chosen["heads"]
    packed = chosen["cu_seqlens"] != ABSENT
    sequences = len(ends) - 1 if packed else 1
    return {
        "dims": {
            "L": ends[-1] + past,
            "HV": heads_v,
            "W": chosen["width"],
            "N": len(ends),
            "S": sequences,
            "slots": 2 * sequences + 1,
            "n": chosen["width"] - 1 + chosen["more_columns"],
        },
        "attrs": {"num_k_heads": heads, "head_k_dim": key, "head_v_dim": value},
        "host": {"cu_seqlens": ends} if packed else {},
        "as_tensor": ("cu_seqlens",) if packed else (),
    }


_VALUES = "normal signed_zeros nan_one inf_one subnormal integers"
_LAYOUTS = "contiguous row_strided odd_strided column_strided every_other misaligned"
_HEAD = "contiguous every_other"

PLAN = Plan(
    sizes={"sequences": tuple(_SEQUENCES), "heads": _HEADS, "width": (4, 2, 3), "more_columns": (0, 1, 5)},
    blank={"sequences": ("no_rows",)},
    case=_case,
    needs={"state_indices": "state_pool", "has_initial_state": "state_pool"},
    attrs={"l2norm_eps": (1e-6, 1e-60, 0.5)},
    fills={
        "x": f"{_VALUES} zeros nan_row top tiny",
        "weight": _VALUES,
        "a": "normal wide_line nan_one inf_one",
        "b": "normal wide_line nan_one inf_one",
        "A_log": "normal nan_one",
        "dt_bias": "normal nan_one",
        "bias": "normal nan_one inf_one",
        "initial_state": _VALUES,
        "state_pool": f"odd_nan {_VALUES} top",
        "state_indices": _INDICES,
        "has_initial_state": "two_of_three zeros",
    },
    layouts={
        "x": f"{_LAYOUTS} one_of_three offset expanded",
        "weight": f"{_LAYOUTS} expanded",
        "a": f"{_LAYOUTS} second_half",
        "b": f"{_LAYOUTS} first_half",
        "A_log": _HEAD,
        "dt_bias": _HEAD,
        "bias": "contiguous every_other misaligned",
        "initial_state": f"{_LAYOUTS} last_two_swapped expanded",
        "state_pool": "contiguous row_strided column_strided last_two_swapped one_of_three misaligned",
        "state_indices": _HEAD,
        "has_initial_state": _HEAD,
    },
)
