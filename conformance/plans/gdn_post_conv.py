"""What the covering cases of `gdn_post_conv` vary."""

from collections.abc import Mapping
from typing import Any

from polyfuse.conformance.plan import Plan

# Rows, key heads, value heads, K and V.
_SHAPES = (
    *((5, 2, 4, 16, 8), (0, 2, 4, 8, 8), (1, 1, 3, 1, 1), (2, 3, 3, 24, 40), (31, 4, 4, 80, 96), (33, 2, 4, 128, 64)),
    *((7, 1, 1, 256, 256), (65, 2, 6, 33, 5), (129, 1, 4, 8, 16), (9, 2, 1, 16, 8), (4, 2, 3, 7, 9)),
    *((3, 16, 32, 128, 128), (1025, 1, 2, 4, 4)),
)


def _case(chosen: Mapping[str, Any]) -> Mapping[str, Any]:
    rows, heads, heads_v, key, value = chosen["shape"]
    return {
        "dims": {"L": rows, "HV": heads_v},
        "attrs": {"num_k_heads": heads, "head_k_dim": key, "head_v_dim": value},
    }


_GATES = "normal zeros nan_one inf_one negative_inf_one largest wide_line subnormal large"
_ROWS = "contiguous row_strided odd_strided token_stride_1 one_of_three first_half second_half every_other misaligned"
_HEADS = "contiguous every_other misaligned expanded_last"

PLAN = Plan(
    sizes={"shape": _SHAPES},
    blank={"shape": tuple(shape for shape in _SHAPES if shape[0] == 0)},
    case=_case,
    attrs={"l2norm_eps": (1e-6, 1e-60, 1e-12, 0.5)},
    fills={
        "conv_out": "normal zeros signed_zeros nan_one nan_row inf_one largest huge subnormal tiny tiny_vectors large "
        "integers one_hot equal",
        "a": _GATES,
        "b": _GATES,
        "A_log": "normal zeros nan_one negative_inf_one",
        "dt_bias": "normal zeros nan_one inf_one negative_inf_one",
    },
    layouts={
        "conv_out": f"{_ROWS} offset expanded",
        "a": f"{_ROWS} expanded",
        "b": f"{_ROWS} expanded_last",
        "A_log": _HEADS,
        "dt_bias": _HEADS,
    },
)
