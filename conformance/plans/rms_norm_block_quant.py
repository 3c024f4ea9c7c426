"""What the covering cases of `rms_norm_block_quant` vary."""

from polyfuse.conformance.plan import Plan
from polyfuse.conformance.plans import _quantising as quantising

PLAN = Plan(
    sizes=quantising.SIZES,
    blank={"shape": quantising.BLANK},
    case=quantising.case,
    attrs={**quantising.ATTRS, "eps": (1e-6, 1e-60, 0.5), "weight_offset": (0.0, 1.0, -1.0)},
    fills={
        **quantising.FILLS,
        "weight": "normal zeros signed_zeros nan_one inf_one largest subnormal",
        "residual": "normal zeros signed_zeros nan_one inf_one largest huge subnormal tiny integers",
    },
    layouts={
        **quantising.LAYOUTS,
        "weight": "contiguous every_other misaligned second_half",
        "residual": "contiguous row_strided odd_strided column_strided one_of_three every_other misaligned expanded",
    },
)
