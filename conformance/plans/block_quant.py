"""What the covering cases of `block_quant` vary."""

from polyfuse.conformance.plan import Plan
from polyfuse.conformance.plans import _quantising as quantising

PLAN = Plan(
    sizes=quantising.SIZES,
    blank={"shape": quantising.BLANK},
    case=quantising.case,
    attrs=quantising.ATTRS,
    fills=quantising.FILLS,
    layouts=quantising.LAYOUTS,
)
