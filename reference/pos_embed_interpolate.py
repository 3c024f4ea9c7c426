"""The oracle of `pos_embed_interpolate`; the formula is the docstring of `polyfuse.spec.pos_embed_interpolate`."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from polyfuse.reference._numerics import F64, Exact, round_to, to_f64
from polyfuse.spec import FP32_ROUNDOFF, FP32_TINY, Capability, dtype_name
from polyfuse.spec.pos_embed_interpolate import SPEC

CAPABILITY = Capability(devices=("cpu",))


def axis_taps(index: NDArray[np.int64], size: int, side: int, mode: str, align_corners: bool) -> tuple[F64, F64]:
    """Table cells and their weights for target positions `index` on an axis of `size`; both [len(index), taps]."""
    if align_corners:
        numerator, denominator = index * (side - 1), max(size - 1, 1)
    else:
        numerator, denominator = (2 * index + 1) * side - size, 2 * size
    cell, remainder = np.divmod(numerator, denominator)
    f = remainder / denominator
    g = 1 - f
    if mode == "bilinear":
        offsets, weights = [0, 1], [g, f]
    else:
        a = -0.75
        offsets = [-1, 0, 1, 2]
        weights = [
            a * f * g * g,
            g * (1 + f - (a + 2) * f * f),
            f * (1 + g - (a + 2) * g * g),
            a * g * f * f,
        ]
    taps = np.clip(cell[:, None] + np.array(offsets), 0, side - 1)
    return taps, np.stack(weights, axis=1)


def exact(
    table: NDArray[np.generic],
    grid_thw: Sequence[Sequence[int]] | NDArray[np.integer],
    *,
    merge_size: int = 2,
    mode: str = "bilinear",
    align_corners: bool = True,
    base: NDArray[np.generic] | None = None,
    out_dtype: str | None = None,
    out_rows: int | None = None,
) -> dict[str, Exact]:
    """The unrounded result and its allowed error, `{"out": [rows, D]}`."""
    source = to_f64(table)
    side, width = round(len(source) ** 0.5), source.shape[1]
    steps = SPEC.bound("out").steps({"mode": mode})
    images = [tuple(int(v) for v in row) for row in grid_thw]
    total = sum(t * h * w for t, h, w in images)
    rows = total if out_rows is None else out_rows
    if any(not _usable(image, merge_size, side) for image in images) or total > rows:
        return {"out": Exact.around(np.full((rows, width), np.nan), np.zeros((rows, width)))}

    value, magnitude = np.zeros((rows, width)), np.zeros((rows, width))
    start = 0
    for t, h, w in images:
        if t == 0:
            continue
        row, column = _merge_order(h, w, merge_size)
        y, wy = axis_taps(row, h, side, mode, align_corners)
        x, wx = axis_taps(column, w, side, mode, align_corners)
        frame, frame_magnitude = np.zeros((h * w, width)), np.zeros((h * w, width))
        for i in range(y.shape[1]):
            for j in range(x.shape[1]):
                cells = source[y[:, i] * side + x[:, j]]
                weight = (wy[:, i] * wx[:, j])[:, None]
                cells = np.where(weight == 0, 0.0, cells)
                with np.errstate(invalid="ignore"):
                    frame += weight * cells
                frame_magnitude += (np.abs(wy[:, i]) + np.abs(wx[:, j]))[:, None] * np.abs(cells)
        value[start : start + t * h * w] = np.tile(frame, (t, 1))
        magnitude[start : start + t * h * w] = np.tile(frame_magnitude, (t, 1))
        start += t * h * w
    if base is not None:
        with np.errstate(invalid="ignore"):
            value[:total] += to_f64(base)[:total]
        magnitude[:total] += np.abs(to_f64(base)[:total])
    return {"out": Exact.around(value, steps * FP32_ROUNDOFF * magnitude + (steps + 2) * FP32_TINY)}


def pos_embed_interpolate(
    table: NDArray[np.generic],
    grid_thw: Sequence[Sequence[int]] | NDArray[np.integer],
    *,
    merge_size: int = 2,
    mode: str = "bilinear",
    align_corners: bool = True,
    base: NDArray[np.generic] | None = None,
    out_dtype: str | None = None,
    out_rows: int | None = None,
) -> NDArray[np.generic]:
    """[rows, D], rounded once."""
    result = exact(
        table,
        grid_thw,
        merge_size=merge_size,
        mode=mode,
        align_corners=align_corners,
        base=base,
        out_rows=out_rows,
    )["out"]
    return round_to(result.value, out_dtype or dtype_name((table if base is None else base).dtype))


def _usable(image: tuple[int, ...], merge_size: int, side: int) -> bool:
    _, h, w = image
    fits = 2 * side * (max(h, w) + 1) < 2**31
    return image == (0, 0, 0) or (min(image) > 0 and h % merge_size == 0 and w % merge_size == 0 and fits)


def _merge_order(h: int, w: int, m: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of every patch of one frame in spatial-merge order (h/m, w/m, m, m)."""
    patches = np.arange(h * w).reshape(h // m, m, w // m, m).transpose(0, 2, 1, 3).reshape(-1)
    return patches // w, patches % w
