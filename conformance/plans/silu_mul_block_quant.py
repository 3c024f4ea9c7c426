"""What the covering cases of `silu_mul_block_quant` vary."""

from collections.abc import Mapping
from typing import Any

from polyfuse.conformance.plan import Plan
from polyfuse.conformance.plans import _quantising as quantising

# Limits, and what they are on: one factor, as without a limit there is nothing for it to be on.
_LIMITS = ((None, "input"), (0.75, "input"), (7.0, "input"), (0.75, "silu"), (7.0, "silu"))


def _case(chosen: Mapping[str, Any]) -> Mapping[str, Any]:
    found = quantising.case(chosen)
    limit, limit_on = chosen["limits"]
    return {**found, "attrs": {**found["attrs"], "limit": limit, "limit_on": limit_on}}


PLAN = Plan(
    sizes={**quantising.SIZES, "limits": _LIMITS},
    blank={"shape": quantising.BLANK},
    case=_case,
    attrs={
        **quantising.ATTRS,
        "limit_on": (),  # of `limits`
        "alpha": (1.0, 1.702, -0.5),
        "up_offset": (0.0, 1.0, -0.5),
    },
    fills={
        **quantising.FILLS,
        "up": "normal zeros signed_zeros nan_one inf_one largest subnormal integers one_hot",
        "row_weight": "normal zeros nan_one inf_one subnormal large",
    },
    layouts={
        **quantising.LAYOUTS,
        "up": "contiguous row_strided odd_strided column_strided one_of_three every_other misaligned expanded",
        "row_weight": "contiguous every_other misaligned expanded",
    },
)
