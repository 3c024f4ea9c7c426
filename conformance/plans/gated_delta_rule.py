"""What the covering cases of `gated_delta_rule` vary."""

from collections.abc import Mapping
from typing import Any

from polyfuse.conformance.covering import ABSENT
from polyfuse.conformance.plan import Plan

# Where sequences end, and the rows past the last one.
_SEQUENCES = {
    "mixed": ((2, 2, 5, 12, 12, 13), 4),
    "no_rows": ((0, 0, 0), 0),
    "all_empty": ((1, 1, 1), 2),
    "first_and_last_empty": ((0, 0, 5, 5), 0),
    "single_rows": (tuple(range(10)), 0),
    "around_64": ((0, 63, 127, 192), 0),
    "around_128": ((1, 128, 257), 1),
    "many": ((0, *(2 * i + 1 for i in range(20))), 0),
}
# Key heads, value heads, K and V.
_HEADS = (
    *((1, 2, 16, 8), (0, 0, 8, 8), (1, 1, 1, 1), (2, 2, 5, 7), (3, 9, 8, 8), (1, 1, 33, 31), (2, 4, 24, 72)),
    *((1, 1, 64, 65), (1, 1, 128, 16), (1, 1, 256, 4)),
)


def _case(chosen: Mapping[str, Any]) -> Mapping[str, Any]:
    ends, past = _SEQUENCES[chosen["sequences"]]
    heads, heads_v, key, value = chosen["heads"]
    packed = chosen["cu_seqlens"] != ABSENT
    sequences = len(ends) - 1 if packed else 1
    return {
        "dims": {
            "L": ends[-1] + past,
            "H": heads,
            "HV": heads_v,
            "K": key,
            "V": value,
            "N": len(ends),
            "S": sequences,
            "slots": 2 * sequences + 1,
        },
        "host": {"cu_seqlens": ends} if packed else {},
        "as_tensor": ("cu_seqlens",) if packed else (),
    }


_LAYOUTS = "contiguous row_strided odd_strided column_strided sliced one_of_three every_other misaligned offset"
_STATES = "contiguous row_strided column_strided last_two_swapped one_of_three misaligned"
_HEAD = "contiguous every_other"

PLAN = Plan(
    sizes={"sequences": tuple(_SEQUENCES), "heads": _HEADS},
    blank={"sequences": ("no_rows", "all_empty"), "heads": ((0, 0, 8, 8),)},
    case=_case,
    needs={"state_indices": "state_pool", "has_initial_state": "state_pool"},
    attrs={"scale": (None, 0.02, 2.0)},
    fills={
        "q": "unit zeros signed_zeros unit-one_nan unit-one_inf subnormal basis",
        "k": "unit zeros unit-one_nan unit-one_inf subnormal parallel",
        "v": "normal zeros signed_zeros nan_one nan_row inf_one subnormal tiny integers",
        "g": "decay zeros strong resets very_negative decay-one_nan subnormal",
        "beta": "gate zeros ones to_two gate-one_nan subnormal",
        "initial_state": "normal zeros nan_one inf_one subnormal integers large",
        "state_pool": "odd_nan normal signed_zeros nan_one inf_one subnormal integers",
        "state_indices": "shuffled none shuffled_beyond",
        "has_initial_state": "two_of_three zeros",
    },
    layouts={
        **dict.fromkeys("qkv", f"{_LAYOUTS} expanded"),
        "g": f"{_LAYOUTS} expanded_last",
        "beta": f"{_LAYOUTS} expanded_last",
        "initial_state": f"{_STATES} expanded",
        "state_pool": _STATES,
        "state_indices": _HEAD,
        "has_initial_state": _HEAD,
    },
)
