"""What the covering cases of `gdn_decode` vary."""

from collections.abc import Mapping
from typing import Any

from polyfuse.conformance.covering import ABSENT
from polyfuse.conformance.plan import Plan

# Key heads, value heads, K and V.
_HEADS = ((2, 4, 16, 16), (1, 1, 1, 1), (3, 6, 5, 7), (2, 2, 24, 40), (1, 4, 33, 31), (1, 1, 64, 128), (1, 2, 128, 64))
# Sequences of one token, of 1 or 2 tokens, and of more.
_BATCHES = {"few": (4, 3, 2), "none": (0, 0, 0), "one": (1, 1, 1), "many": (33, 9, 4)}


def _case(chosen: Mapping[str, Any]) -> Mapping[str, Any]:
    heads, heads_v, key, value = chosen["heads"]
    tokens, width = chosen["tokens"], chosen["width"]
    batch = _BATCHES[chosen["batch"]][0 if not tokens else 1 if tokens <= 2 else 2]
    pool = 2 * batch * max(tokens, 1) + 1
    columns = width - 1 + (tokens - 1 if tokens else chosen["more_columns"])
    fill = {}
    if chosen["state_indices"] != ABSENT:
        accepted = chosen["num_accepted"] != ABSENT
        usual = ("slots_accepted" if accepted else "slots_padded") if tokens else "shuffled"
        fill = {
            "state_indices": "no_slots" if chosen["no_slots"] else usual,
            "num_accepted": f"accepted_{tokens}",
        }
    return {
        "dims": {
            "...": (batch, tokens) if tokens else (batch,),
            "B": batch,
            "HV": heads_v,
            "W": width,
            "n": columns,
            "conv_slots": pool + 1,
            "slots": pool,
        },
        "attrs": {"num_k_heads": heads, "head_k_dim": key, "head_v_dim": value},
        "fill": fill,
    }


_VALUES = "normal zeros nan_one nan_row inf_one subnormal tiny"
_LAYOUTS = "contiguous row_strided odd_strided column_strided one_of_three every_other misaligned"
_POOLS = "contiguous row_strided column_strided last_two_swapped one_of_three misaligned"
_HEAD = "contiguous every_other"

PLAN = Plan(
    sizes={
        "tokens": (0, 1, 2, 3, 4, 8),
        "batch": tuple(_BATCHES),
        "heads": _HEADS,
        "width": (4, 2, 3),
        "more_columns": (0, 1, 3),
        "no_slots": (False, True),
    },
    blank={"batch": ("none",), "no_slots": (True,)},
    case=_case,
    needs={"num_accepted": "tokens", "tokens": "state_indices"},
    attrs={"l2norm_eps": (1e-6, 1e-60, 0.5), "norm_eps": (1e-6, 1e-60, 0.5), "scale": (None, 0.7)},
    fills={
        "x": f"{_VALUES} signed_zeros integers large",
        "z": f"{_VALUES} wide_line",
        "a": "normal wide_line nan_one inf_one large",
        "b": "normal wide_line nan_one inf_one",
        "conv_weight": "normal zeros nan_one",
        "A_log": "normal nan_one",
        "dt_bias": "normal nan_one",
        "norm_weight": "normal zeros nan_one",
        "conv_state": _VALUES,
        "recurrent_state": f"{_VALUES} large",
        "conv_bias": "normal nan_one",
    },
    layouts={
        "x": f"{_LAYOUTS} expanded",
        "z": f"{_LAYOUTS} expanded",
        "a": f"{_LAYOUTS} second_half",
        "b": f"{_LAYOUTS} first_half",
        "conv_weight": _LAYOUTS,
        "A_log": _HEAD,
        "dt_bias": _HEAD,
        "norm_weight": _HEAD,
        "conv_state": _POOLS,
        "recurrent_state": _POOLS,
        "conv_bias": _HEAD,
        "state_indices": _HEAD,
        "num_accepted": _HEAD,
    },
)
