"""Conformance of `rms_norm_block_quant`: cases, fills, and wrong implementations that must be rejected."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, product
from typing import Any

import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill, scaled
from polyfuse.conformance.mutations import Mutant, changed, common, patched
from polyfuse.conformance.ops._quantising import (
    BYTES,
    PLAIN_FORMATS,
    PLAIN_LAYOUTS,
    QUANTISER_FILLS,
    option_cases,
    quantiser_mutants,
)
from polyfuse.reference import rms_norm_block_quant as oracle
from polyfuse.reference._numerics import to_f64
from polyfuse.spec import FLOATS
from polyfuse.spec.rms_norm_block_quant import NAME


def cases() -> Iterator[Case]:
    small = {"...": (5,), "D": 128}
    for dtype, with_residual in product(BYTES, (False, True)):
        attrs = {"group_size": 32, "quant_dtype": dtype}
        given = ("residual",) if with_residual else ()
        yield Case(f"{dtype}-residual_{with_residual}", small, attrs, {"T": "bfloat16"}, present=given)
    for dtype, offset in product(FLOATS, (0.0, 1.0)):
        attrs, dtypes = {"group_size": 64, "weight_offset": offset}, {"T": dtype, "weight": dtype}
        yield Case(f"{dtype}-offset_{offset}", small, attrs, dtypes, present=("residual",))
    for (fmt, layout), dtype in zip(product(PLAIN_FORMATS, PLAIN_LAYOUTS), cycle(BYTES), strict=False):
        attrs = {"group_size": 32, "quant_dtype": dtype, "scale_format": fmt, "scale_layout": layout}
        yield Case(f"layout-{fmt}-{layout}", small, attrs, {"T": "bfloat16"})
    for lead in ((0,), (1,), (67,), (2, 2, 2)):
        name = f"lead_{'x'.join(map(str, lead))}"
        yield Case(name, {"...": lead, "D": 64}, {"group_size": 32}, {"T": "bfloat16"}, present=("residual",))
    for width, group in ((1, 3), (72, 24), (1000, 128), (96, 7)):
        yield Case(f"width_{width}", {"...": (4,), "D": width}, {"group_size": group}, {"T": "bfloat16"})
    for fill in ("zeros", "nan_some", "inf_some", "tiny", "decades", "huge"):
        yield Case(f"fill_{fill}", {"...": (12,), "D": 96}, {"group_size": 32}, present=("residual",), fill={"x": fill})
    for least in (0.0, 0.5):
        attrs = {"group_size": 32, "scale_min": least}
        yield Case(
            f"scale_min_{least}", {"...": (12,), "D": 96}, attrs, fill={"x": "zeros" if least == 0 else "normal"}
        )
    yield Case("scale_ub", small, {"group_size": 32, "scale_ub": 1e-3})
    yield Case("reciprocal", small, {"group_size": 32, "reciprocal": True}, {"T": "bfloat16"})
    yield Case("eps_large", small, {"eps": 0.5})
    yield Case("eps_of_small_rows", small, {"eps": 1e-5}, fill={"x": "around_1e_3"})
    for x, residual in (("row_strided", "one_of_three"), ("column_strided", "contiguous")):
        layout = {"x": x, "residual": residual, "weight": "second_half"}
        yield Case(f"{x}-{residual}", {"...": (9,), "D": 64}, {"group_size": 32}, present=("residual",), layout=layout)
    for case in option_cases():
        if "num_rows" in case.present or "expert_ends" in case.present:
            case = replace(case, present=(*case.present, "residual"))
        yield case
    # 211,200 rows: more than 2**31 elements.
    yield Case("over_2_31", {"...": (660,), "D": 12288}, {}, {"T": "bfloat16"}, repeat=320)


FILLS: dict[str, Fill] = QUANTISER_FILLS | {"around_1e_3": scaled(1e-3)}


def _inverse_of(rms: Any) -> Any:
    def make(right: Any) -> Any:
        def inverse(x: Any, eps: float) -> Any:
            with np.errstate(divide="ignore", invalid="ignore"):
                return 1 / rms((x * x).mean(-1, keepdims=True), eps)

        return inverse

    return make


def _unrounded_sum(right: Any) -> Any:
    """The norm of a sum that has not been rounded."""
    return lambda x, residual: to_f64(x) if residual is None else to_f64(x) + to_f64(residual)


# Mistakes in the last bit, which the roundings of y hide; the suite of block_quant rejects them.
WITHIN_ROUNDINGS = ("ties_away", "reciprocal_ignored")

MUTANTS: dict[str, Mutant] = (
    common(NAME)
    | {
        name: mutant
        for name, mutant in quantiser_mutants(NAME, oracle.rms_norm_block_quant).items()
        if name not in WITHIN_ROUNDINGS
    }
    | {
        "eps_outside_the_root": patched(NAME, oracle, "inverse_rms", _inverse_of(lambda m, eps: np.sqrt(m) + eps)),
        "eps_as_a_floor": patched(NAME, oracle, "inverse_rms", _inverse_of(lambda m, eps: np.sqrt(np.maximum(m, eps)))),
        "weight_dropped": changed(NAME, lambda v: {"weight": np.ones_like(v["weight"])}),
        "weight_offset_dropped": changed(NAME, lambda v: {"weight_offset": 0.0}),
        "weight_offset_always": changed(NAME, lambda v: {"weight_offset": 1.0}),
        "residual_read_as_zero": changed(
            NAME, lambda v: {} if v["residual"] is None else {"residual": np.zeros_like(v["residual"])}
        ),
        "norm_of_an_unrounded_sum": patched(NAME, oracle, "summed", _unrounded_sum),
        "residual_returned_as_it_was": lambda **v: _residual_returned(v),
    }
)


def _residual_returned(values: dict[str, Any]) -> Any:
    q, scale, total = oracle.rms_norm_block_quant(**values)
    return q, scale, total if values["residual"] is None else values["residual"]
