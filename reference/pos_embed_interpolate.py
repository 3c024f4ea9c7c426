"""The oracle of `pos_embed_interpolate`; the formula is the docstring of `polyfuse.spec.pos_embed_interpolate`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfuse.reference._numerics import F64, FP32_MAX, Array, Exact, may_flush, to_f64
from polyfuse.reference._oracle import Error, Oracle
from polyfuse.spec import Capability
from polyfuse.spec.pos_embed_interpolate import SPEC, table_sides

CAPABILITY = Capability(devices=("cpu",))

Grid = Sequence[Sequence[int]] | NDArray[np.integer[Any]]


def formula(
    table: Array,
    grid_thw: Grid,
    *,
    base: Array | None,
    merge_size: int,
    mode: str,
    align_corners: bool,
    out_dtype: str | None,
    out_rows: int | None,
    table_height: int | None,
) -> F64:
    """out [rows, D]."""
    source, images = to_f64(table), [tuple(int(v) for v in image) for image in grid_thw]
    sides, total = table_sides(len(source), table_height), sum(t * h * w for t, h, w in images)
    out = np.zeros((total if out_rows is None else out_rows, source.shape[1]))
    if total > len(out) or not all(usable(image, merge_size, sides) for image in images):
        return np.full_like(out, np.nan)
    for rows, frames, y, x in image_taps(images, sides, merge_size, mode, align_corners):
        frame = sum(weight * cells for weight, _, cells in products(source, sides, y, x))
        out[rows] = np.tile(frame, (frames, 1))
    if base is not None:
        out[:total] += to_f64(base)[:total]
    return out


Taps = tuple[NDArray[np.int64], F64]  # table cells and their weights, both [patches, taps]


def axis_taps(index: NDArray[np.int64], size: int, side: int, mode: str, align_corners: bool) -> Taps:
    """Table cells and weights, [len(index), taps], for positions `index` on an axis of `size` over `side` cells."""
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


def image_taps(
    images: Sequence[tuple[int, ...]], sides: tuple[int, int], merge_size: int, mode: str, align_corners: bool
) -> Iterator[tuple[slice, int, Taps, Taps]]:
    """For each used image its rows of the result, its number of frames, and the taps of a frame's patches."""
    start, (height, width) = 0, sides
    for t, h, w in images:
        if t == 0:
            continue
        row, column = merge_order(h, w, merge_size)
        y = axis_taps(row, h, height, mode, align_corners)
        x = axis_taps(column, w, width, mode, align_corners)
        yield slice(start, start + t * h * w), t, y, x
        start += t * h * w


def products(source: F64, sides: tuple[int, int], y: Taps, x: Taps) -> Iterator[tuple[F64, F64, F64]]:
    """For each tap (weight, |wy| + |wx|, cells) of the patches; a cell of weight 0 is not read."""
    for i in range(y[0].shape[1]):
        for j in range(x[0].shape[1]):
            wy, wx = y[1][:, i, None], x[1][:, j, None]
            cells = source[y[0][:, i] * sides[1] + x[0][:, j]]
            yield wy * wx, np.abs(wy) + np.abs(wx), np.where(wy * wx == 0, 0.0, cells)


def usable(image: tuple[int, ...], merge_size: int, sides: tuple[int, int]) -> bool:
    """Whether an image is unused, or one that the spec allows."""
    _, h, w = image
    fits = 2 * max(sides) * (max(h, w) + 1) < 2**31
    return image == (0, 0, 0) or (min(image) > 0 and h % merge_size == 0 and w % merge_size == 0 and fits)


def merge_order(h: int, w: int, m: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of every patch of one frame in spatial-merge order (h/m, w/m, m, m)."""
    patches = np.arange(h * w).reshape(h // m, m, w // m, m).transpose(0, 2, 1, 3).reshape(-1)
    return patches // w, patches % w


def bounds(exact: Mapping[str, F64], given: Any, error: Error) -> dict[str, Exact]:
    """A relative error of sum (|wy| + |wx|) * |cell| + |base|; none at grid points, where nothing is rounded."""
    relative, flush = error("out")
    out, source = exact["out"], to_f64(given.table)
    magnitude, unrounded = np.zeros_like(out), np.zeros((len(out), 1), bool)
    largest = np.zeros_like(out)  # partial sum
    images = [tuple(int(v) for v in image) for image in given.grid_thw]
    sides, total = table_sides(len(source), given.table_height), sum(t * h * w for t, h, w in images)
    if not np.isnan(out).all():
        for rows, frames, y, x in image_taps(images, sides, given.merge_size, given.mode, given.align_corners):
            taps = list(products(source, sides, y, x))
            frame = sum(known * np.abs(cells) for _, known, cells in taps)
            largest[rows] = np.tile(sum(np.abs(weight * cells) for weight, _, cells in taps), (frames, 1))
            weights = np.concatenate([y[1], x[1]], axis=-1)
            at_grid_point = np.isin(weights, (0, 1)).all(-1, keepdims=True)
            magnitude[rows] = np.tile(frame, (frames, 1))
            unrounded[rows] = np.tile(at_grid_point, (frames, 1))
    interpolated = out.copy()
    if given.base is not None:
        base = to_f64(given.base)[:total]
        magnitude[:total] += np.abs(base)
        largest[:total] += np.abs(base)
        interpolated[:total] -= base
    may_be_flushed = may_flush(out) | may_flush(interpolated) | may_flush(out - interpolated)
    unrounded = unrounded & (out.astype(np.float32) == out) & ~may_be_flushed
    result = Exact.around(out, np.where(unrounded, 0.0, relative * magnitude + flush))
    undefined = np.isfinite(largest) & (largest > FP32_MAX)
    low, high = np.where(undefined, -np.inf, result.low), np.where(undefined, np.inf, result.high)
    return {"out": Exact(out, low, high)}


pos_embed_interpolate = Oracle(SPEC, formula, bounds)
