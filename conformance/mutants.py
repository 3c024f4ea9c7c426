"""Wrong implementations that the tolerances must reject, per op: a bound that lets one pass is too wide.

Each is a variation of the op in NumPy that makes one mistake a kernel author could make.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from polyfuse.reference import pos_embed_interpolate as pos_embed
from polyfuse.reference._numerics import round_to, to_f64
from polyfuse.spec import dtype_name

Mutant = Callable[..., Any]


def _right(**values: Any) -> Any:
    return pos_embed.pos_embed_interpolate(**values)


def _out_dtype(values: Mapping[str, Any]) -> str:
    base = values["base"]
    return str(values["out_dtype"] or dtype_name((values["table"] if base is None else base).dtype))


def _unrounded(**values: Any) -> Any:
    return pos_embed.exact(**{k: v for k, v in values.items() if k != "out_dtype"})["out"].value


def zeros(**values: Any) -> Any:
    return np.zeros_like(_right(**values))


def constant(**values: Any) -> Any:
    out = _right(**values)
    return np.full_like(out, out.reshape(-1)[0] if out.size else 0)


def last_row_dropped(**values: Any) -> Any:
    out = _right(**values)
    out[-1:] = 0
    return out


def one_precision_lower(**values: Any) -> Any:
    """The result passes through the next narrower dtype."""
    narrower = {"float32": "float16", "float16": "bfloat16", "bfloat16": "float8_e5m2"}[_out_dtype(values)]
    with np.errstate(over="ignore", invalid="ignore"):
        return to_f64(_unrounded(**values).astype(np.float32).astype(getattr(ml_dtypes, narrower, narrower))).astype(
            _right(**values).dtype
        )


def rounded_before_base(**values: Any) -> Any:
    """Two roundings: the interpolated rows, then their sum with base."""
    dtype = _out_dtype(values)
    rows = to_f64(round_to(_unrounded(**{**values, "base": None}), dtype))
    return round_to(rows if values["base"] is None else rows + to_f64(values["base"]), dtype)


def _with_taps(change: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """The op with another function in place of the oracle's `axis_taps`."""
    right = pos_embed.axis_taps
    pos_embed.axis_taps = lambda *args: change(right, *args)
    try:
        return _right(**values)
    finally:
        pos_embed.axis_taps = right


def weights_in_bfloat16(**values: Any) -> Any:
    def change(right: Any, *args: Any) -> Any:
        taps, weights = right(*args)
        return taps, to_f64(round_to(weights, "bfloat16"))

    return _with_taps(change, values)


def float_scale(**values: Any) -> Any:
    """The source coordinate as index times a scale rounded to float32."""

    def change(right: Any, index: Any, size: int, side: int, mode: str, align_corners: bool) -> Any:
        if mode != "bilinear" or not align_corners:
            return right(index, size, side, mode, align_corners)
        source = index.astype(np.float32) * np.float32((side - 1) / max(size - 1, 1))
        cell = np.floor(source).astype(np.int64)
        f = (source - cell).astype(np.float64)
        return np.clip(cell[:, None] + np.array([0, 1]), 0, side - 1), np.stack([1 - f, f], axis=1)

    return _with_taps(change, values)


def other_corners(**values: Any) -> Any:
    return _right(**{**values, "align_corners": not values["align_corners"]})


def other_mode(**values: Any) -> Any:
    return _right(**{**values, "mode": "bicubic" if values["mode"] == "bilinear" else "bilinear"})


def raster_order(**values: Any) -> Any:
    return _right(**{**values, "merge_size": 1})


def height_and_width_swapped(**values: Any) -> Any:
    return _right(**{**values, "grid_thw": [(t, w, h) for t, h, w in values["grid_thw"]]})


MUTANTS: dict[str, tuple[Mutant, ...]] = {
    "pos_embed_interpolate": (
        zeros,
        constant,
        last_row_dropped,
        one_precision_lower,
        rounded_before_base,
        weights_in_bfloat16,
        float_scale,
        other_corners,
        other_mode,
        raster_order,
        height_and_width_swapped,
    ),
}
