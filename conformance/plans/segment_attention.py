"""What the covering cases of `segment_attention` vary."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from polyfuse.conformance.plan import Plan

# Where segments end, and the rows past the last one.
_SEGMENTS = {
    "mixed": ((0, 5, 6, 6, 30, 47), 3),
    "none": ((0,), 4),
    "no_rows": ((0, 0, 0), 0),
    "one_row": ((0, 1), 0),
    "single_rows": (tuple(range(34)), 1),
    "first_and_last_empty": ((0, 0, 0, 33, 64, 64), 2),
    "around_64": ((0, 63, 127, 192), 0),
    "around_128": ((0, 127, 255, 384), 5),
    "many": ((0, *(3 * i + 1 for i in range(130))), 0),
    "1030_rows": ((0, 300, 660, 1030), 0),
}
_HEADS = ((2, 16), (0, 8), (1, 0), (1, 1), (3, 5), (2, 31), (1, 33), (9, 8), (2, 64), (1, 72), (1, 128), (1, 200))
_LONGEST = ("none", "exact", "more")


def _case(chosen: Mapping[str, Any]) -> Mapping[str, Any]:
    ends, past = _SEGMENTS[chosen["segments"]]
    heads, dim = chosen["heads_dim"]
    longest = max((b - a for a, b in pairwise(ends)), default=0)
    return {
        "dims": {"rows": ends[-1] + past, "heads": heads, "dim": dim, "N": len(ends)},
        "attrs": {"max_seqlen": {"none": None, "exact": longest, "more": longest + 70}[chosen["longest"]]},
        "host": {"cu_seqlens": ends},
        "as_tensor": ("cu_seqlens",),
    }


_VALUES = "normal zeros signed_zeros nan_one nan_row inf_one subnormal tiny integers one_hot equal"
_LAYOUTS = (
    "contiguous row_strided odd_strided column_strided sliced one_of_three every_other misaligned offset "
    "expanded expanded_last"
)

PLAN = Plan(
    sizes={"segments": tuple(_SEGMENTS), "heads_dim": _HEADS, "longest": _LONGEST},
    blank={"segments": ("none", "no_rows"), "heads_dim": ((0, 8), (1, 0))},
    case=_case,
    attrs={"scale": (None, 0.02, 2.0)},
    fills={"q": f"{_VALUES} large", "k": _VALUES, "v": f"{_VALUES} large huge"},
    layouts=dict.fromkeys("qkv", _LAYOUTS),
)
