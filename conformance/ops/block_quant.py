"""Conformance of `block_quant`: cases, fills, and wrong implementations that must be rejected."""

from collections.abc import Iterator
from itertools import cycle, product
from typing import Any

import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill
from polyfuse.conformance.mutations import Mutant, changed, common
from polyfuse.conformance.ops._quantising import (
    BYTES,
    PLAIN_FORMATS,
    PLAIN_LAYOUTS,
    QUANTISER_FILLS,
    option_cases,
    quantiser_mutants,
)
from polyfuse.reference import block_quant as oracle
from polyfuse.spec import FLOATS
from polyfuse.spec.block_quant import NAME


def cases() -> Iterator[Case]:
    small = {"...": (5,), "D": 128}
    for (fmt, layout), dtype in zip(product(PLAIN_FORMATS, PLAIN_LAYOUTS), cycle(BYTES), strict=False):
        attrs = {"group_size": 32, "quant_dtype": dtype, "scale_format": fmt, "scale_layout": layout}
        yield Case(f"{dtype}-{fmt}-{layout}", small, attrs, {"x": "bfloat16"})
    for dtype in FLOATS:
        yield Case(dtype, small, {"group_size": 64}, {"x": dtype})
    for lead in ((0,), (1,), (67,), (2, 2, 2)):
        yield Case(f"lead_{'x'.join(map(str, lead))}", {"...": lead, "D": 64}, {"group_size": 32}, {"x": "bfloat16"})
    for group, width in ((128, 256), (48, 144), (7, 21), (1, 3), (96, 96)):
        yield Case(f"group_{group}", {"...": (4,), "D": width}, {"group_size": group}, {"x": "bfloat16"})
    for dtype, fill in product(BYTES, ("zeros", "nan_some", "inf_some", "tiny", "decades", "subnormal")):
        attrs = {"group_size": 32, "quant_dtype": dtype}
        yield Case(f"fill_{fill}-{dtype}", {"...": (12,), "D": 96}, attrs, fill={"x": fill})
    for least, fill in product((0.0, 0.5), ("zeros", "decades")):
        attrs = {"group_size": 32, "scale_min": least}
        yield Case(f"scale_min_{least}-{fill}", {"...": (12,), "D": 96}, attrs, fill={"x": fill})
    for dtype, fmt in (("int8", "float32"), ("float8_e4m3fn", "ue8m0")):
        attrs = {"group_size": 32, "quant_dtype": dtype, "scale_format": fmt, "reciprocal": True}
        yield Case(f"reciprocal-{dtype}-{fmt}", {"...": (12,), "D": 96}, attrs, fill={"x": "decades"})
    yield Case("scale_ub", small, {"group_size": 32, "scale_ub": 1e-3})
    for layout in ("row_strided", "column_strided", "one_of_three"):
        yield Case(layout, {"...": (9,), "D": 64}, {"group_size": 32}, {"x": "bfloat16"}, layout={"x": layout})
    yield Case(
        "experts",
        {"...": (3, 6), "D": 96, "E": 3},
        {"group_size": 32},
        {"x": "bfloat16"},
        present=("num_rows",),
        fill={"num_rows": "row_counts", "x": "nan_past_rows"},
        layout={"x": "column_strided"},
    )
    yield from option_cases()
    # 211,200 rows: more than 2**31 elements.
    yield Case("over_2_31", {"...": (660,), "D": 12288}, {}, {"x": "bfloat16"}, repeat=320)


FILLS: dict[str, Fill] = QUANTISER_FILLS


def _rows_reversed(v: dict[str, Any]) -> dict[str, Any]:
    return {"x": np.ascontiguousarray(v["x"][..., ::-1])}


MUTANTS: dict[str, Mutant] = (
    common(NAME)
    | quantiser_mutants(NAME, oracle.block_quant)
    | {
        "columns_reversed": changed(NAME, _rows_reversed),
        "groups_of_one_column_less": changed(NAME, lambda v: {"group_size": max(v["group_size"] - 2, 1)}),
    }
)
