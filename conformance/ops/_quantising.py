"""What the suites of quantising ops share: cases of the quantiser's options, fills, and wrong quantisers."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill, constant, row_counts
from polyfuse.conformance.mutations import Mutant, changed, patched, returned, right, ties_away
from polyfuse.reference import _quantiser
from polyfuse.reference._numerics import F64, Array, to_f64
from polyfuse.spec import Output, dtype_name
from polyfuse.spec.block_quant import FLOAT4, QMAX, SCALE_FORMATS, SCALE_LAYOUTS

BYTES = tuple(dtype for dtype in QMAX if dtype != FLOAT4)
PLAIN_FORMATS = tuple(scale_format for scale_format in SCALE_FORMATS if scale_format != "e4m3")
PLAIN_LAYOUTS = tuple(layout for layout in SCALE_LAYOUTS if layout != "swizzled_128x4")
MXFP8 = {"group_size": 32, "scale_format": "ue8m0"}
MXFP4 = {"group_size": 32, "quant_dtype": FLOAT4, "scale_format": "ue8m0"}
NVFP4 = {"group_size": 16, "quant_dtype": FLOAT4, "scale_format": "e4m3"}
SWIZZLED = {"scale_layout": "swizzled_128x4"}
ALIGNMENT = 4  # of the experts of `expert_ends_4`


def option_cases() -> Iterator[Case]:
    """Cases of the options that every quantising op has, but for those of the formats of a byte."""
    rows, masked = {"...": (5,), "D": 96}, {"...": (3, 6), "D": 96, "E": 3}
    behind = {"...": (17,), "D": 96, "E": 4}
    low = {"T": "bfloat16"}
    yield Case("mxfp8", rows, MXFP8, low)
    yield Case("mxfp8-swizzled", {"...": (131,), "D": 160}, MXFP8 | SWIZZLED, low)
    for fill in ("decades", "zeros", "nan_some", "inf_some", "ladder"):
        yield Case(f"mxfp4-{fill}", {"...": (12,), "D": 96}, MXFP4, fill={"x": fill})
        yield Case(f"nvfp4-{fill}", {"...": (12,), "D": 96}, NVFP4, fill={"x": fill})
        yield Case(f"mxfp8-{fill}", {"...": (12,), "D": 96}, MXFP8, fill={"x": fill})
    yield Case("float4-float32", rows, {"group_size": 32, "quant_dtype": FLOAT4}, low)
    yield Case("mxfp4-packed", {"...": (2, 3), "D": 160}, MXFP4 | {"scale_format": "ue8m0_packed"}, low)
    yield Case("mxfp4-swizzled", rows, MXFP4 | SWIZZLED, low)
    for layout in SCALE_LAYOUTS:
        attrs = NVFP4 | {"scale_layout": layout}
        yield Case(f"nvfp4-{layout}", {"...": (5,), "D": 176}, attrs, low, present=("global_scale",), fill=_GLOBAL)
    fills = {"num_rows": "row_counts", "x": "nan_past_rows"}
    yield Case("nvfp4-experts", masked, NVFP4 | SWIZZLED, low, present=("num_rows",), fill=fills)
    for fmt, layout in (("float32", "col_major_tma"), ("ue8m0_packed", "row_major"), ("ue8m0", "swizzled_128x4")):
        attrs = {"group_size": 32, "scale_format": fmt, "scale_layout": layout, "fill": 4.0}
        name = f"fill-{fmt}-{layout}"
        yield Case(f"{name}-experts", masked, attrs, low, present=("num_rows",), fill=fills)
        yield Case(f"{name}-rows", rows, attrs, low)
    for alignment in (1, ALIGNMENT):
        fills = {"expert_ends": f"expert_ends_{alignment}", "x": f"nan_between_{alignment}"}
        for fmt, extra in (("float32", {}), ("ue8m0", SWIZZLED), ("ue8m0_packed", {"fill": 0.5})):
            attrs = {"group_size": 32, "scale_format": fmt, "expert_alignment": alignment, **extra}
            name = f"expert_ends_{alignment}-{fmt}"
            yield Case(name, behind, attrs, low, present=("expert_ends",), fill=fills)
    for width, group in ((100, 32), (5, 8), (130, 128)):
        for fmt in ("float32", "ue8m0_packed"):
            attrs = {"group_size": group, "scale_format": fmt}
            yield Case(f"partial_{width}_{group}-{fmt}", {"...": (4,), "D": width}, attrs, low)
    yield Case("partial-nvfp4", {"...": (4,), "D": 42}, NVFP4 | SWIZZLED, low)
    yield Case("scale_min-ue8m0-tiny", {"...": (12,), "D": 96}, MXFP8, fill={"x": "tiny"})


_GLOBAL = {"global_scale": "a_thousandth"}


def decades(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Magnitudes from 1e-4 to 1e3, so that the groups of a row have very different scales."""
    return rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 3, (*shape[:-1], 1))


def _ladder(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Multiples of 1/8 up to 6, of both signs: numbers and ties of the narrow formats."""
    return rng.integers(-48, 49, shape) / 8


def _row_counts(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    return row_counts(shape[0]).astype(np.float64)


def _nan_past_rows(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """NaN in the rows of each expert past its `row_counts`: they must not be read."""
    values = rng.standard_normal(shape)
    for expert, count in enumerate(row_counts(shape[0])):
        values[expert, count:] = np.nan
    return values


def ends(count: int, alignment: int) -> list[int]:
    """Where so many experts of `row_counts` rows end."""
    found, end = [], 0
    for rows in row_counts(count):
        end = -(-end // alignment) * alignment + int(rows)
        found.append(end)
    return found


def _expert_ends(alignment: int) -> Fill:
    return lambda rng, shape, dtype: np.array(ends(shape[0], alignment), np.float64)


def _nan_between(alignment: int) -> Fill:
    """NaN in the rows that are none of four experts'."""

    def fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
        values = rng.standard_normal(shape)
        values[~_quantiser.owned_rows(shape[0], np.array(ends(4, alignment)), alignment)] = np.nan
        return values

    return fill


QUANTISER_FILLS: dict[str, Fill] = {
    "decades": decades,
    "ladder": _ladder,
    "row_counts": _row_counts,
    "nan_past_rows": _nan_past_rows,
    "expert_ends_1": _expert_ends(1),
    "expert_ends_4": _expert_ends(ALIGNMENT),
    "nan_between_1": _nan_between(1),
    "nan_between_4": _nan_between(ALIGNMENT),
    **{f"rows_{count}": constant(count) for count in (8, 20, 64, 700, 4096)},  # of each expert, in bench cases
    "a_thousandth": lambda rng, shape, dtype: np.full(shape, 0.001),
}


def _scale_of_the_next_group(q: Array, scale: Array, *rest: Array) -> tuple[Array, ...]:
    return q, np.roll(scale, 1, axis=-1), *rest


def _scale_transposed(q: Array, scale: Array, *rest: Array) -> tuple[Array, ...]:
    return q, np.ascontiguousarray(np.moveaxis(scale, -1, 0)).reshape(scale.shape), *rest


def _packed_in_reverse(q: Array, scale: Array, *rest: Array) -> tuple[Array, ...]:
    return q, scale.byteswap() if scale.dtype == np.int32 else scale, *rest


def _nan_saturates(q: Array, scale: Array, *rest: Array) -> tuple[Array, ...]:
    """A maximum that skips NaN, and a cast that saturates it."""
    nan = np.isnan(to_f64(q))
    q[nan] = np.float32(QMAX.get(dtype_name(q.dtype), 0)).astype(q.dtype)
    return q, scale, *rest


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
        away = output.name == "q" and output.dtype != "uint8"
        rounded: Array = ties_away(value, output.dtype) if away else store(value, output)
        return rounded

    return stored


def _nan_becomes_the_largest(right: Any) -> Any:
    """What the conversion of a GPU does, which has no NaN to give."""

    def saturated(y: F64, divisor: F64) -> F64:
        q: F64 = right(y, divisor)
        return np.where(np.isnan(q), np.inf, q)

    return saturated


def _codes_of(change: Callable[[F64], F64]) -> Callable[[Any], Any]:
    return lambda right: lambda q: right(change(q))


def _nibbles_swapped(right: Any) -> Any:
    return lambda code: right(np.stack([code[..., 1::2], code[..., 0::2]], -1).reshape(code.shape))


def _rounded_down(right: Any) -> Any:
    return lambda scale: np.where(np.isfinite(scale), right(scale) / 2, scale)


def _row_by_row(right: Any) -> Any:
    """A swizzled array that lies row by row."""

    def rows(scale: F64, padding: float) -> F64:
        pad = [(0, 0), (0, -scale.shape[1] % 128), (0, -scale.shape[2] % 4)]
        return np.pad(scale, pad, constant_values=padding)

    return rows


def _unaligned(right: Any) -> Any:
    return lambda rows, ends, alignment: right(rows, ends, 1)


def quantiser_mutants(op: str, oracle: Any) -> dict[str, Mutant]:
    """The mistakes of quantising ops; `oracle` is the op's."""

    def unrounded_scale_used(**values: Any) -> Any:
        """q of the scale before it was rounded up to a power of two."""
        plain = {"scale_format": "float32", "scale_layout": "row_major", "fill": None}
        if values["scale_format"] == "e4m3":
            plain = {}
        q, *_ = right(op, {**values, **plain})
        return (q, *right(op, values)[1:])

    def swapped(name: str, make: Callable[[Any], Any]) -> Mutant:
        return patched(op, _quantiser, name, make)

    def four_bits_nan_saturates(**values: Any) -> Any:
        wrong = swapped("ratio", _nan_becomes_the_largest) if values["quant_dtype"] == FLOAT4 else None
        return wrong(**values) if wrong else right(op, values)

    return {
        "scale_of_the_next_group": returned(op, _scale_of_the_next_group),
        "scale_transposed": returned(op, _scale_transposed),
        "packed_in_reverse": returned(op, _packed_in_reverse),
        "nan_saturates": returned(op, _nan_saturates),
        "truncated": patched(op, oracle, "store", _truncating),
        "ties_away": patched(op, oracle, "store", _rounding_ties_away),
        "unrounded_scale_used": unrounded_scale_used,
        "scale_rounded_down": swapped("power_of_two_above", _rounded_down),
        "no_scale_floor": swapped("scale_floor", lambda right: lambda *_: 1e-30),
        "ue8m0_with_the_floor_of_float32": swapped(
            "scale_floor", lambda right: lambda dtype, least, form: right(dtype, least, "float32")
        ),
        "four_bits_nan_saturates": four_bits_nan_saturates,
        "four_bits_truncated": swapped("codes", _codes_of(lambda q: np.trunc(q * 2) / 2)),
        "four_bits_without_sign": swapped("codes", _codes_of(np.abs)),
        "halves_of_bytes_swapped": swapped("pairs", _nibbles_swapped),
        "swizzled_row_by_row": swapped("swizzle", _row_by_row),
        "global_scale_ignored": changed(op, lambda v: {"global_scale": None}),
        "global_scale_of_scales_only": swapped(
            "divisors", lambda right: lambda scale, by, width: right(scale / _quantiser.global_factor(by), by, width)
        ),
        "fill_ignored": changed(op, lambda v: {"fill": None}),
        "fill_of_one": changed(op, lambda v: {"fill": None if v["fill"] is None else 1.0}),
        "alignment_ignored": swapped("owned_rows", _unaligned),
        "experts_end_inclusive": changed(
            op, lambda v: {} if v["expert_ends"] is None else {"expert_ends": v["expert_ends"] - 1}
        ),
        "scale_ub_ignored": changed(op, lambda v: {"scale_ub": None}),
        "scale_min_ignored": changed(op, lambda v: {"scale_min": None}),
        "zero_scale_min_raised": changed(op, lambda v: {"scale_min": 1e-12 if v["scale_min"] == 0 else v["scale_min"]}),
        "reciprocal_ignored": changed(op, lambda v: {"reciprocal": False}),
    }
