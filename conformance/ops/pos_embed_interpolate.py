"""Conformance of `pos_embed_interpolate`: cases, fills, and wrong implementations that must be rejected."""

from collections.abc import Callable, Iterator
from itertools import product
from math import isqrt
from typing import Any

import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill
from polyfuse.conformance.mutations import Mutant, changed, common, patched, ties_away
from polyfuse.reference import pos_embed_interpolate as oracle
from polyfuse.reference._numerics import F64, round_to, to_f64
from polyfuse.spec import FLOATS, bind
from polyfuse.spec.pos_embed_interpolate import NAME, SPEC

_GRIDS = {
    "one_patch_block": ((1, 2, 2),),
    "upsample": ((1, 10, 14),),
    "downsample": ((1, 4, 2),),
    "table_size": ((1, 6, 6),),
    "video": ((3, 4, 6),),
    "mixed": ((1, 8, 6), (2, 4, 4), (1, 2, 20)),
}


def cases() -> Iterator[Case]:
    small = {"N": 6, "D": 24}
    for grid, mode, corners in product(_GRIDS, ("bilinear", "bicubic"), (True, False)):
        attrs = {"mode": mode, "align_corners": corners}
        yield Case(f"{grid}-{mode}-{_corners(corners)}", small, attrs, host={"grid_thw": _GRIDS[grid]})
    grid = {"grid_thw": _GRIDS["mixed"]}
    for dtype, out, base in product(FLOATS, (None, *FLOATS), (None, *FLOATS)):
        name = f"dtypes-{dtype}-out_{out or 'default'}-base_{base or 'none'}"
        dtypes = {"table": dtype} | ({"base": base} if base else {})
        yield Case(name, small, {"out_dtype": out}, dtypes, grid, present=("base",) if base else ())
    for merge, corners in product((1, 3), (True, False)):
        attrs = {"merge_size": merge, "align_corners": corners}
        host = {"grid_thw": ((2, 3 * merge, 5 * merge),)}
        yield Case(f"merge_{merge}-{_corners(corners)}", small, attrs, host=host)
    for mode, form, base in product(("bilinear", "bicubic"), ("host", "tensor"), ((), ("base",))):
        yield Case(
            f"padded-{mode}-grid_{form}{'-base' if base else ''}",
            small,
            {"mode": mode, "out_rows": 150},
            {"table": "bfloat16", "grid_thw": "int32"} | ({"base": "bfloat16"} if base else {}),
            {"grid_thw": (*_GRIDS["mixed"], (0, 0, 0), (0, 0, 0))},
            as_tensor=("grid_thw",) if form == "tensor" else (),
            present=base,
            fill={"base": "nan_tail"} if base else {},
        )
    for name, values, rows in (
        ("exact_fit", _GRIDS["mixed"], 120),
        ("all_unused", ((0, 0, 0),), 4),
        ("too_few_rows", _GRIDS["mixed"], 119),
        ("indivisible", ((1, 2, 2), (1, 3, 4)), 32),
        ("negative", ((1, 2, 2), (-1, 2, 2)), 32),
    ):
        yield Case(f"device_grid-{name}", small, {"out_rows": rows}, host={"grid_thw": values}, as_tensor=("grid_thw",))
    for mode, fill in product(("bilinear", "bicubic"), ("nan_some", "inf_some", "huge", "subnormal", "zeros")):
        yield Case(f"fill_{fill}-{mode}", small, {"mode": mode}, host=grid, fill={"table": fill})
    attrs = {"merge_size": 2, "align_corners": True}
    for mode in ("bilinear", "bicubic"):
        yield Case(
            f"grid_points-{mode}",
            small,
            attrs | {"mode": mode},
            {"table": "bfloat16", "base": "bfloat16"},
            {"grid_thw": ((1, 6, 6), (2, 6, 6))},
            present=("base",),
        )
    for layout in ("row_strided", "column_strided"):
        dtypes = {"table": "bfloat16", "base": "bfloat16"}
        both = {"table": layout, "base": layout}
        yield Case(layout, small, {}, dtypes, grid, present=("base",), layout=both)
    yield Case("grid_as_tensor", small, host=grid, as_tensor=("grid_thw",))
    yield Case("table_of_one", {"N": 1, "D": 8}, host=grid)
    yield Case("width_zero", {"N": 4, "D": 0}, host=grid)
    yield Case("width_one", {"N": 5, "D": 1}, host=grid)
    yield Case("width_odd", {"N": 5, "D": 131}, host=grid)
    yield Case("many_images", {"N": 5, "D": 8}, host={"grid_thw": ((1, 2, 2),) * 70})
    yield from _oblong_tables()
    # N = 48, h = 94: rounding the scale (N-1)/(h-1) puts the last row one cell early.
    yield Case("float_scale_trap", {"N": 48, "D": 8}, host={"grid_thw": ((1, 94, 94),)})
    # 1,884,160 rows: more than 2**31 elements.
    yield Case(
        "over_2_31", {"N": 48, "D": 1152}, dtypes={"table": "bfloat16"}, host={"grid_thw": ((1, 64, 64),)}, repeat=460
    )


def _oblong_tables() -> Iterator[Case]:
    """Tables of other heights than widths; that of 16 x 36 has as many rows as a square one of 24 x 24."""
    grid = {"grid_thw": _GRIDS["mixed"]}
    for (height, columns), mode, corners in product(
        ((3, 5), (16, 36), (1, 7), (7, 1)), ("bilinear", "bicubic"), (True, False)
    ):
        attrs = {"mode": mode, "align_corners": corners, "table_height": height}
        yield Case(f"table_{height}x{columns}-{mode}-{_corners(corners)}", {"N": columns, "D": 24}, attrs, host=grid)
    for form in ("host", "tensor"):
        yield Case(
            f"table_3x5-padded-grid_{form}",
            {"N": 5, "D": 24},
            {"table_height": 3, "out_rows": 150},
            {"table": "bfloat16", "base": "bfloat16"},
            {"grid_thw": (*_GRIDS["mixed"], (0, 0, 0))},
            as_tensor=("grid_thw",) if form == "tensor" else (),
            present=("base",),
            fill={"base": "nan_tail"},
        )
    points = {"grid_thw": ((2, 4, 6),)}
    yield Case("table_4x6-grid_points", {"N": 6, "D": 24}, {"table_height": 4}, {"table": "bfloat16"}, points)
    yield Case("table_6x6-height_given", {"N": 6, "D": 24}, {"table_height": 6}, host=grid)


def _corners(align: bool) -> str:
    return "corners" if align else "half_pixel"


def _nan_tail(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """NaN in the last fifth of the rows: for padding that must not be read."""
    values = rng.standard_normal(shape)
    values[shape[0] - shape[0] // 5 :] = np.nan
    return values


FILLS: dict[str, Fill] = {"nan_tail": _nan_tail}


def _weights_in_bfloat16(right: Callable[..., Any]) -> Callable[..., Any]:
    def taps(*args: Any) -> Any:
        cells, weights = right(*args)
        return cells, to_f64(round_to(weights, "bfloat16"))

    return taps


def _float_scale(right: Callable[..., Any]) -> Callable[..., Any]:
    """The source coordinate as index times a scale rounded to float32."""

    def taps(index: Any, size: int, side: int, mode: str, align_corners: bool) -> Any:
        if mode != "bilinear" or not align_corners:
            return right(index, size, side, mode, align_corners)
        source = index.astype(np.float32) * np.float32((side - 1) / max(size - 1, 1))
        cell = np.floor(source).astype(np.int64)
        f = (source - cell).astype(np.float64)
        return np.clip(cell[:, None] + np.array([0, 1]), 0, side - 1), np.stack([1 - f, f], axis=1)

    return taps


def _rounded_before_base(**values: Any) -> Any:
    """Two roundings: the interpolated rows, then their sum with base."""
    dtype = bind(SPEC, values).outputs[0].dtype
    rows = to_f64(oracle.pos_embed_interpolate(**{**values, "base": None, "out_dtype": dtype}))
    return (round_to(rows if values["base"] is None else rows + to_f64(values["base"]), dtype),)


def _ties_away(**values: Any) -> Any:
    value = oracle.pos_embed_interpolate.intervals(**values)["out"].value
    return (ties_away(value, bind(SPEC, values).outputs[0].dtype),)


def _swapped(values: dict[str, Any]) -> dict[str, Any]:
    return {"grid_thw": [(t, w, h) for t, h, w in values["grid_thw"]]}


def _exchanged(values: dict[str, Any]) -> dict[str, Any]:
    height = values["table_height"]
    return {} if height is None else {"table_height": len(values["table"]) // height}


def _as_a_square(values: dict[str, Any]) -> dict[str, Any]:
    """The height is ignored: the table is the largest square that it has the rows for."""
    return {"table_height": None, "table": values["table"][: isqrt(len(values["table"])) ** 2]}


def _shorter_side_for_both(right: Callable[..., Any]) -> Callable[..., Any]:
    """Both axes have coordinates as if the table were as long as its shorter side."""
    return lambda images, sides, *options: right(images, (min(sides), min(sides)), *options)


MUTANTS: dict[str, Mutant] = common(NAME) | {
    "rounded_before_base": _rounded_before_base,
    "ties_away": _ties_away,
    "weights_in_bfloat16": patched(NAME, oracle, "axis_taps", _weights_in_bfloat16),
    "float_scale": patched(NAME, oracle, "axis_taps", _float_scale),
    "other_corners": changed(NAME, lambda v: {"align_corners": not v["align_corners"]}),
    "other_mode": changed(NAME, lambda v: {"mode": "bicubic" if v["mode"] == "bilinear" else "bilinear"}),
    "raster_order": changed(NAME, lambda v: {"merge_size": 1}),
    "height_and_width_swapped": changed(NAME, _swapped),
    "table_sides_exchanged": changed(NAME, _exchanged),
    "table_as_a_square": changed(NAME, _as_a_square),
    "shorter_side_for_both": patched(NAME, oracle, "image_taps", _shorter_side_for_both),
}
