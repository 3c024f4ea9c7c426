"""Conformance of `silu_mul_block_quant`: cases, fills, and wrong implementations that must be rejected."""

from collections.abc import Iterator
from itertools import cycle, product
from typing import Any

import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill, row_counts
from polyfuse.conformance.mutations import Mutant, changed, common, patched, returned, right, ties_away
from polyfuse.reference import silu_mul_block_quant as oracle
from polyfuse.reference._numerics import F64, Array, to_f64
from polyfuse.spec import FLOATS, Output, dtype_name
from polyfuse.spec.silu_mul_block_quant import NAME, QMAX, SCALE_FORMATS, SCALE_LAYOUTS


def cases() -> Iterator[Case]:
    small = {"...": (5,), "D": 128}
    for dtype, fmt, layout in product(QMAX, SCALE_FORMATS, SCALE_LAYOUTS):
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
        for layout in SCALE_LAYOUTS:
            attrs = {"group_size": 32, "scale_layout": layout}
            yield Case(f"lead_{'x'.join(map(str, lead))}-{layout}", {"...": lead, "D": 64}, attrs, {"T": "bfloat16"})
    for fmt, layout in product(SCALE_FORMATS, SCALE_LAYOUTS):
        yield Case(
            f"experts-{fmt}-{layout}",
            {"...": (3, 6), "D": 160, "E": 3},
            {"group_size": 32, "scale_format": fmt, "scale_layout": layout},
            {"T": "bfloat16"},
            present=("num_rows",),
            fill={"num_rows": "row_counts", "x": "nan_past_rows"},
        )
    for dtype, fmt in product(QMAX, ("float32", "ue8m0")):
        for fill in ("zeros", "nan_some", "inf_some", "large", "tiny", "decades", "outliers"):
            attrs = {"group_size": 32, "quant_dtype": dtype, "scale_format": fmt}
            yield Case(f"fill_{fill}-{dtype}-{fmt}", {"...": (12,), "D": 96}, attrs, fill={"x": fill})
    for dtype in ("float8_e4m3fn", "int8"):
        for ub in (1e-3, 10.0):
            yield Case(f"scale_ub_{ub}-{dtype}", small, {"group_size": 32, "quant_dtype": dtype, "scale_ub": ub})
    yield Case("scale_ub-inf_some", small, {"group_size": 32, "scale_ub": 0.01}, fill={"x": "inf_some"})
    fills = ("zeros", "tiny", "decades", "nan_some", "inf_some")
    for (fill, least), dtype in zip(product(fills, (0.0, 1e-12, 0.5)), cycle(QMAX), strict=False):
        attrs = {"group_size": 32, "quant_dtype": dtype, "scale_min": least}
        yield Case(f"scale_min_{least}-{fill}-{dtype}", {"...": (12,), "D": 96}, attrs, fill={"x": fill})
    for fmt in SCALE_FORMATS[1:]:
        attrs = {"group_size": 32, "scale_format": fmt, "scale_min": 0.01}
        yield Case(f"scale_min_0.01-{fmt}", {"...": (12,), "D": 96}, attrs, fill={"x": "decades"})
    attrs = {"scale_layout": "col_major", "scale_min": 0.0, "materialize": True}
    yield Case("scale_min_0.0-materialize", {"...": (5,), "D": 256}, attrs, {"T": "bfloat16"}, fill={"x": "decades"})
    for dtype, fmt, fill in (
        *((dtype, "float32", "decades") for dtype in QMAX),
        ("int8", "ue8m0", "decades"),
        ("float8_e4m3fn", "ue8m0_packed", "zeros"),
    ):
        attrs = {"group_size": 32, "quant_dtype": dtype, "scale_format": fmt, "materialize": True, "reciprocal": True}
        name = f"reciprocal-{fill}-{dtype}-{fmt}"
        yield Case(name, {"...": (12,), "D": 96}, attrs, {"T": "bfloat16"}, fill={"x": fill})
    yield Case("reciprocal", small, {"group_size": 32, "reciprocal": True})
    for dtype, fmt in product(QMAX, SCALE_FORMATS[1:]):
        attrs = {"group_size": 32, "quant_dtype": dtype, "scale_format": fmt, "materialize": True}
        yield Case(f"ties-{dtype}-{fmt}", {"...": (12,), "D": 96}, attrs, {"T": "bfloat16"})
    yield Case("scale_min_above_ub", small, {"group_size": 32, "scale_ub": 1e-3, "scale_min": 2e-3})
    for layout in ("row_strided", "column_strided"):
        yield Case(layout, {"...": (9,), "D": 64}, {"group_size": 32}, {"T": "bfloat16"}, layout={"x": layout})
    yield from _up_cases()
    # 211,200 rows: more than 2**31 elements.
    yield Case("over_2_31", {"...": (660,), "D": 12288}, {}, {"T": "bfloat16"}, repeat=320)


def _up_cases() -> Iterator[Case]:
    """Gate and up as two arrays, each where it lies."""
    small = {"...": (5,), "D": 128}
    for dtype, materialize in product(FLOATS, (False, True)):
        attrs = {"group_size": 32, "materialize": materialize, "limit": 0.75 if materialize else None}
        yield Case(f"up-{dtype}-materialize_{materialize}", small, attrs, {"T": dtype}, present=("up",))
    for dtype, fmt, layout in zip(QMAX, cycle(SCALE_FORMATS), cycle(SCALE_LAYOUTS), strict=False):
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


def _decades(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Magnitudes from 1e-4 to 1e3, so that the groups of a row have very different scales."""
    return rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 3, (*shape[:-1], 1))


def _outliers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Normal values, of which one in a hundred is a hundred times as large."""
    values = rng.standard_normal(shape)
    values[rng.random(shape) < 0.01] *= 100
    return values


def _row_counts(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    return row_counts(shape[0]).astype(np.float64)


def _nan_past_rows(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """NaN in the rows of each expert past its `row_counts`: they must not be read."""
    values = rng.standard_normal(shape)
    for expert, count in enumerate(row_counts(shape[0])):
        values[expert, count:] = np.nan
    return values


FILLS: dict[str, Fill] = {
    "decades": _decades,
    "outliers": _outliers,
    "row_counts": _row_counts,
    "nan_past_rows": _nan_past_rows,
}


def _scale_of_the_next_group(q: Array, scale: Array) -> tuple[Array, Array]:
    return q, np.roll(scale, 1, axis=-1)


def _scale_transposed(q: Array, scale: Array) -> tuple[Array, Array]:
    return q, np.ascontiguousarray(np.moveaxis(scale, -1, 0)).reshape(scale.shape)


def _packed_in_reverse(q: Array, scale: Array) -> tuple[Array, Array]:
    return q, scale.byteswap() if scale.dtype == np.int32 else scale


def _nan_saturates(q: Array, scale: Array) -> tuple[Array, Array]:
    """A maximum that skips NaN, and a cast that saturates it."""
    nan = np.isnan(to_f64(q))
    q[nan] = np.float32(QMAX.get(dtype_name(q.dtype), 0)).astype(q.dtype)
    return q, scale


def _truncating(store: Any) -> Any:
    def truncated(value: F64, output: Output) -> Array:
        if output.name == "q":
            grid = np.float64(2) ** (np.frexp(value)[1] - 4)
            value = np.trunc(value / grid) * grid
        stored: Array = store(value, output)
        return stored

    return truncated


def _rounding_ties_away(store: Any) -> Any:
    def stored(value: F64, output: Output) -> Array:
        rounded: Array = ties_away(value, output.dtype) if output.name == "q" else store(value, output)
        return rounded

    return stored


def _unrounded_scale_used(**values: Any) -> Any:
    """q of the scale before it was rounded up to a power of two."""
    q, _ = right(NAME, {**values, "scale_format": "float32"})
    return q, right(NAME, values)[1]


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


def _rounded_down(right: Any) -> Any:
    return lambda scale: np.where(np.isfinite(scale), right(scale) / 2, scale)


MUTANTS: dict[str, Mutant] = common(NAME) | {
    "scale_of_the_next_group": returned(NAME, _scale_of_the_next_group),
    "scale_transposed": returned(NAME, _scale_transposed),
    "packed_in_reverse": returned(NAME, _packed_in_reverse),
    "nan_saturates": returned(NAME, _nan_saturates),
    "truncated": patched(NAME, oracle.silu_mul_block_quant, "store", _truncating),
    "ties_away": patched(NAME, oracle.silu_mul_block_quant, "store", _rounding_ties_away),
    "unrounded_scale_used": _unrounded_scale_used,
    "scale_rounded_down": patched(NAME, oracle, "power_of_two_above", _rounded_down),
    "no_scale_floor": patched(NAME, oracle, "scale_floor", lambda right: lambda *_: 1e-30),
    "gate_and_up_swapped": changed(NAME, _gate_and_up_swapped),
    "up_ignored": changed(NAME, _up_behind_gate),
    "up_with_the_strides_of_x": changed(NAME, _up_with_the_strides_of_x),
    "limit_ignored": changed(NAME, lambda v: {"limit": None}),
    "scale_ub_ignored": changed(NAME, lambda v: {"scale_ub": None}),
    "scale_min_ignored": changed(NAME, lambda v: {"scale_min": None}),
    "zero_scale_min_raised": changed(NAME, lambda v: {"scale_min": 1e-12 if v["scale_min"] == 0 else v["scale_min"]}),
    "always_materialized": changed(NAME, lambda v: {"materialize": True}),
    "never_materialized": changed(NAME, lambda v: {"materialize": False}),
    "reciprocal_ignored": changed(NAME, lambda v: {"reciprocal": False}),
}
