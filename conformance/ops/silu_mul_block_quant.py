"""Conformance of `silu_mul_block_quant`: cases, fills, and wrong implementations that must be rejected."""

from collections.abc import Iterator
from itertools import cycle, product
from typing import Any

import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill
from polyfuse.conformance.mutations import Mutant, changed, common, patched
from polyfuse.conformance.ops._quantising import (
    BYTES,
    MXFP8,
    NVFP4,
    PLAIN_FORMATS,
    PLAIN_LAYOUTS,
    QUANTISER_FILLS,
    option_cases,
    quantiser_mutants,
)
from polyfuse.reference import silu_mul_block_quant as oracle
from polyfuse.reference._numerics import F64
from polyfuse.spec import FLOATS
from polyfuse.spec.silu_mul_block_quant import NAME

GPT_OSS = {"alpha": 1.702, "up_offset": 1.0, "limit": 7.0}


def cases() -> Iterator[Case]:
    small = {"...": (5,), "D": 128}
    for dtype, fmt, layout in product(BYTES, PLAIN_FORMATS, PLAIN_LAYOUTS):
        attrs = {"group_size": 32, "quant_dtype": dtype, "scale_format": fmt, "scale_layout": layout}
        yield Case(f"{dtype}-{fmt}-{layout}", small, attrs, {"T": "bfloat16"})
    for dtype, materialize, limit in product(FLOATS, (False, True), (None, 0.75)):
        attrs = {"group_size": 64, "materialize": materialize, "limit": limit}
        yield Case(f"{dtype}-materialize_{materialize}-limit_{limit}", small, attrs, {"T": dtype})
    for group, width in ((128, 256), (64, 192), (48, 144), (7, 21), (1, 3), (256, 512), (96, 96)):
        for fmt in ("float32", "ue8m0_packed"):
            attrs = {"group_size": group, "scale_format": fmt}
            yield Case(f"group_{group}-{fmt}", {"...": (4,), "D": width}, attrs, {"T": "bfloat16"})
    for lead in ((0,), (1,), (67,), (2, 3), (2, 2, 2)):
        for layout in PLAIN_LAYOUTS:
            attrs = {"group_size": 32, "scale_layout": layout}
            yield Case(f"lead_{'x'.join(map(str, lead))}-{layout}", {"...": lead, "D": 64}, attrs, {"T": "bfloat16"})
    for fmt, layout in product(PLAIN_FORMATS, PLAIN_LAYOUTS):
        yield Case(
            f"experts-{fmt}-{layout}",
            {"...": (3, 6), "D": 160, "E": 3},
            {"group_size": 32, "scale_format": fmt, "scale_layout": layout},
            {"T": "bfloat16"},
            present=("num_rows",),
            fill={"num_rows": "row_counts", "x": "nan_past_rows"},
        )
    for dtype, fmt in product(BYTES, ("float32", "ue8m0")):
        for fill in ("zeros", "nan_some", "inf_some", "large", "tiny", "decades", "outliers"):
            attrs = {"group_size": 32, "quant_dtype": dtype, "scale_format": fmt}
            yield Case(f"fill_{fill}-{dtype}-{fmt}", {"...": (12,), "D": 96}, attrs, fill={"x": fill})
    for dtype in ("float8_e4m3fn", "int8"):
        for ub in (1e-3, 10.0):
            yield Case(f"scale_ub_{ub}-{dtype}", small, {"group_size": 32, "quant_dtype": dtype, "scale_ub": ub})
    yield Case("scale_ub-inf_some", small, {"group_size": 32, "scale_ub": 0.01}, fill={"x": "inf_some"})
    fills = ("zeros", "tiny", "decades", "nan_some", "inf_some")
    for (fill, least), dtype in zip(product(fills, (0.0, 1e-12, 0.5)), cycle(BYTES), strict=False):
        attrs = {"group_size": 32, "quant_dtype": dtype, "scale_min": least}
        yield Case(f"scale_min_{least}-{fill}-{dtype}", {"...": (12,), "D": 96}, attrs, fill={"x": fill})
    for fmt in PLAIN_FORMATS[1:]:
        attrs = {"group_size": 32, "scale_format": fmt, "scale_min": 0.01}
        yield Case(f"scale_min_0.01-{fmt}", {"...": (12,), "D": 96}, attrs, fill={"x": "decades"})
    attrs = {"scale_layout": "col_major", "scale_min": 0.0, "materialize": True}
    yield Case("scale_min_0.0-materialize", {"...": (5,), "D": 256}, attrs, {"T": "bfloat16"}, fill={"x": "decades"})
    for dtype, fmt, fill in (
        *((dtype, "float32", "decades") for dtype in BYTES),
        ("int8", "ue8m0", "decades"),
        ("float8_e4m3fn", "ue8m0_packed", "zeros"),
    ):
        attrs = {"group_size": 32, "quant_dtype": dtype, "scale_format": fmt, "materialize": True, "reciprocal": True}
        name = f"reciprocal-{fill}-{dtype}-{fmt}"
        yield Case(name, {"...": (12,), "D": 96}, attrs, {"T": "bfloat16"}, fill={"x": fill})
    yield Case("reciprocal", small, {"group_size": 32, "reciprocal": True})
    for dtype, fmt in product(BYTES, PLAIN_FORMATS[1:]):
        attrs = {"group_size": 32, "quant_dtype": dtype, "scale_format": fmt, "materialize": True}
        yield Case(f"ties-{dtype}-{fmt}", {"...": (12,), "D": 96}, attrs, {"T": "bfloat16"})
    yield Case("scale_min_above_ub", small, {"group_size": 32, "scale_ub": 1e-3, "scale_min": 2e-3})
    for layout in ("row_strided", "column_strided"):
        yield Case(layout, {"...": (9,), "D": 64}, {"group_size": 32}, {"T": "bfloat16"}, layout={"x": layout})
    yield from _up_cases()
    yield from _activation_cases()
    yield from option_cases()
    # 211,200 rows: more than 2**31 elements.
    yield Case("over_2_31", {"...": (660,), "D": 12288}, {}, {"T": "bfloat16"}, repeat=320)


def _up_cases() -> Iterator[Case]:
    """Gate and up as two arrays, each where it lies."""
    small = {"...": (5,), "D": 128}
    for dtype, materialize in product(FLOATS, (False, True)):
        attrs = {"group_size": 32, "materialize": materialize, "limit": 0.75 if materialize else None}
        yield Case(f"up-{dtype}-materialize_{materialize}", small, attrs, {"T": dtype}, present=("up",))
    for dtype, fmt, layout in zip(BYTES, cycle(PLAIN_FORMATS), cycle(PLAIN_LAYOUTS), strict=False):
        attrs = {"group_size": 32, "quant_dtype": dtype, "scale_format": fmt, "scale_layout": layout}
        yield Case(f"up-{dtype}-{fmt}-{layout}", small, attrs, {"T": "bfloat16"}, present=("up",))
    for lead in ((0,), (1,), (3, 4)):
        dims = {"...": lead, "D": 96}
        name = f"up-lead_{'x'.join(map(str, lead))}"
        yield Case(name, dims, {"group_size": 48}, {"T": "bfloat16"}, present=("up",))
    layouts = ("contiguous", "row_strided", "column_strided", "one_of_three")
    for x, up in ((a, b) for a, b in product(layouts, layouts) if a != b):
        layout = {"x": x, "up": up}
        yield Case(f"up-{x}-{up}", small, {"group_size": 32}, {"T": "bfloat16"}, present=("up",), layout=layout)
    for x, up in (("contiguous", "contiguous"), ("row_strided", "one_of_three"), ("one_of_three", "column_strided")):
        yield Case(
            f"up-experts-{x}-{up}",
            {"...": (3, 6), "D": 64, "E": 3},
            {"group_size": 32, "scale_format": "ue8m0_packed"},
            {"T": "bfloat16"},
            present=("up", "num_rows"),
            fill={"num_rows": "row_counts", "x": "nan_past_rows", "up": "nan_past_rows"},
            layout={"x": x, "up": up},
        )
    for fill in ("decades", "nan_some", "inf_some"):
        yield Case(f"up-fill_{fill}", {"...": (12,), "D": 96}, {"group_size": 32}, present=("up",), fill={"up": fill})


def _activation_cases() -> Iterator[Case]:
    """What y is besides silu(gate) * up."""
    small = {"...": (5,), "D": 96}
    for dtype, materialize in product(FLOATS, (False, True)):
        attrs = GPT_OSS | {"group_size": 32, "materialize": materialize, "interleaved": True}
        yield Case(
            f"gpt_oss-{dtype}-materialize_{materialize}", small, attrs, {"T": dtype}, fill={"x": "around_limits"}
        )
        attrs = {"group_size": 32, "limit": 0.75, "limit_on": "silu", "materialize": materialize}
        yield Case(f"limit_on_silu-{dtype}-materialize_{materialize}", small, attrs, {"T": dtype})
        attrs, dtypes = {"group_size": 32, "materialize": materialize}, {"T": "bfloat16", "row_weight": dtype}
        name = f"row_weight-{dtype}-materialize_{materialize}"
        yield Case(name, small, attrs, dtypes, present=("row_weight",))
    for fmt, width in (("float32", 96), ("ue8m0_packed", 100)):
        attrs = {"group_size": 48, "scale_format": fmt, "interleaved": True}
        yield Case(f"interleaved-{fmt}", {"...": (2, 3), "D": width}, attrs, {"T": "bfloat16"})
    yield Case("interleaved-column_strided", small, NVFP4 | {"interleaved": True}, layout={"x": "column_strided"})
    yield Case("gpt_oss-mxfp8-up", small, MXFP8 | GPT_OSS, present=("up",), fill={"x": "around_limits"})
    yield Case("up_offset-group_7", {"...": (4,), "D": 21}, {"group_size": 7, "up_offset": -0.5, "alpha": 0.5})
    yield Case(
        "row_weight-experts",
        {"...": (3, 6), "D": 96, "E": 3},
        {"group_size": 32},
        {"T": "bfloat16"},
        present=("num_rows", "row_weight"),
        fill={"num_rows": "row_counts", "x": "nan_past_rows"},
        layout={"row_weight": "column_strided"},
    )
    yield Case(
        "row_weight-expert_ends",
        {"...": (17,), "D": 96, "E": 4},
        {"group_size": 32, "expert_alignment": 4},
        {"T": "bfloat16"},
        present=("expert_ends", "row_weight"),
        fill={"expert_ends": "expert_ends_4", "x": "nan_between_4"},
    )
    yield Case(  # times that weight, a zero that fills the last group up is NaN
        "row_weight_inf-partial_group",
        {"...": (5,), "D": 20},
        {"group_size": 16},
        {"T": "bfloat16"},
        present=("row_weight",),
        fill={"row_weight": "inf_one"},
    )


def _around_limits(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Normal values, five times as large: a limit of 7 clamps some."""
    return 5 * rng.standard_normal(shape)


def _outliers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Normal values, of which one in a hundred is a hundred times as large."""
    values = rng.standard_normal(shape)
    values[rng.random(shape) < 0.01] *= 100
    return values


FILLS: dict[str, Fill] = QUANTISER_FILLS | {"outliers": _outliers, "around_limits": _around_limits}


def _gate_and_up_swapped(v: dict[str, Any]) -> dict[str, Any]:
    if v["up"] is not None:
        return {"x": v["up"], "up": v["x"]}
    return {"x": np.roll(v["x"], v["x"].shape[-1] // 2, axis=-1)}


def _up_behind_gate(v: dict[str, Any]) -> dict[str, Any]:
    """The array up is ignored: each up is read D columns behind its gate, where the next row of x lies."""
    if v["up"] is None:
        return {}
    return {"up": np.roll(v["x"], -v["x"].shape[-1])}


def _up_with_the_strides_of_x(v: dict[str, Any]) -> dict[str, Any]:
    """What lies in the memory of up at the places that the strides of x give, within that memory."""
    if v["up"] is None:
        return {}
    up, steps = v["up"], [stride // v["x"].itemsize for stride in v["x"].strides]
    owner = up if up.base is None else up.base
    memory = owner.ravel(order="K")
    first = (up.ctypes.data - owner.ctypes.data) // up.itemsize
    places = first + sum(i * step for i, step in zip(np.indices(up.shape), steps, strict=True))
    return {"up": memory[places % max(memory.size, 1)] if up.size else up}


def _neighbouring_weight(v: dict[str, Any]) -> dict[str, Any]:
    return {} if v["row_weight"] is None else {"row_weight": np.roll(v["row_weight"], 1, axis=-1)}


def _offset_before_the_clamp(right: Any) -> Any:
    """An up that a limit 1 lower would clamp from above, as if its offset of 1 came before the clamp."""

    def halves(x: Any, up: Any, interleaved: bool, limit: float | None, limit_on: str) -> Any:
        gate, factor = right(x, up, interleaved, limit, limit_on)
        return gate, factor if limit is None else np.minimum(factor, limit - 1)

    return halves


def _halves_for_interleaved(v: dict[str, Any]) -> dict[str, Any]:
    return {"interleaved": False}


MUTANTS: dict[str, Mutant] = (
    common(NAME)
    | quantiser_mutants(NAME, oracle.silu_mul_block_quant)
    | {
        "gate_and_up_swapped": changed(NAME, _gate_and_up_swapped),
        "up_ignored": changed(NAME, _up_behind_gate),
        "up_with_the_strides_of_x": changed(NAME, _up_with_the_strides_of_x),
        "interleaved_as_halves": changed(NAME, _halves_for_interleaved),
        "alpha_ignored": changed(NAME, lambda v: {"alpha": 1.0}),
        "up_offset_ignored": changed(NAME, lambda v: {"up_offset": 0.0}),
        "offset_before_the_clamp": patched(NAME, oracle, "gate_and_up", _offset_before_the_clamp),
        "limit_ignored": changed(NAME, lambda v: {"limit": None, "limit_on": "input"}),
        "limit_on_input": changed(NAME, lambda v: {"limit_on": "input"}),
        "row_weight_ignored": changed(NAME, lambda v: {"row_weight": None}),
        "row_weight_of_the_neighbour": changed(NAME, _neighbouring_weight),
        "always_materialized": changed(NAME, lambda v: {"materialize": True}),
        "never_materialized": changed(NAME, lambda v: {"materialize": False}),
    }
)
