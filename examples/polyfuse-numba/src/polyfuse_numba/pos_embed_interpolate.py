"""`pos_embed_interpolate`; the formula is the docstring of `polyfuse.spec.pos_embed_interpolate`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import prange

from polyfuse.spec import Capability
from polyfuse.spec.pos_embed_interpolate import table_sides
from polyfuse_numba._common import (
    BFLOAT16,
    FLOAT16,
    KINDS,
    as_float,
    bits,
    chunks_for,
    compiled,
    encode,
    from_half,
    parallel,
    rows_of,
    units,
)

CAPABILITY = Capability(devices=("cpu",))

NO_BASE = np.empty(0, np.uint16)


def pos_embed_interpolate(
    table: torch.Tensor,
    grid_thw: Sequence[Sequence[int]] | torch.Tensor,
    *,
    merge_size: int = 2,
    mode: str = "bilinear",
    align_corners: bool = True,
    base: torch.Tensor | None = None,
    out_dtype: str | None = None,
    out_rows: int | None = None,
    table_height: int | None = None,
) -> torch.Tensor:
    """[rows, D], rounded once."""
    cells, width = table.shape
    sides = table_sides(cells, table_height)
    dtype = getattr(torch, out_dtype) if out_dtype else (table if base is None else base).dtype
    images = grid_thw.tolist() if isinstance(grid_thw, torch.Tensor) else grid_thw
    total = sum(t * h * w for t, h, w in images)
    rows = total if out_rows is None else out_rows
    if total > rows or not all(_usable(image, merge_size, max(sides)) for image in images):
        return torch.full((rows, width), torch.nan, dtype=dtype)
    out = torch.empty((rows, width), dtype=dtype)
    if out.numel():
        _kernel(
            *rows_of(table),
            *sides,
            width,
            np.array(images, dtype=np.int64).reshape(-1, 3),
            merge_size,
            mode == "bicubic",
            align_corners,
            *((NO_BASE, 0, 0) if base is None else rows_of(base)),
            bits(out),
            KINDS[dtype],
            rows,
            total,
            chunks_for(rows),
        )
    return out


def _usable(image: Sequence[int], merge_size: int, side: int) -> bool:
    """True for an image that the spec allows, and for an unused one; `side` is the longer one of the table."""
    t, h, w = image
    if min(t, h, w) < 1:
        return t == h == w == 0
    return h % merge_size == 0 and w % merge_size == 0 and 2 * side * (max(h, w) + 1) < 2**31


@compiled
def _axis(index: int, size: int, side: int, bicubic: bool, align_corners: bool, cells: Any, weights: Any) -> int:
    """Write the table cells and weights of position `index` on an axis of `size`; returns their number."""
    if align_corners:
        numerator, denominator = index * (side - 1), max(size - 1, 1)
    else:
        numerator, denominator = (2 * index + 1) * side - size, 2 * size
    cell = numerator // denominator
    f = (numerator - cell * denominator) / denominator
    g = 1.0 - f
    if bicubic:
        first, taps = cell - 1, 4
        weights[0], weights[1] = -0.75 * f * g * g, g * (1.0 + f - 1.25 * f * f)
        weights[2], weights[3] = f * (1.0 + g - 1.25 * g * g), -0.75 * g * f * f
    else:
        first, taps = cell, 2
        weights[0], weights[1] = g, f
    for i in range(taps):
        cells[i] = min(max(first + i, 0), side - 1)
    return taps


@compiled
def _add(kind: int, source: Any, weight: Any, total: Any) -> None:
    """total += weight * source."""
    if kind == BFLOAT16:
        for i in range(total.size):
            total[i] += weight * as_float(np.uint32(np.uint32(source[i]) << np.uint32(16)))
    elif kind == FLOAT16:
        for i in range(total.size):
            total[i] += weight * from_half(np.uint32(source[i]))
    else:
        values = source.view(np.float32)
        for i in range(total.size):
            total[i] += weight * values[i]


@parallel
def _kernel(
    table: Any,
    table_stride: int,
    table_kind: int,
    table_rows: int,
    table_columns: int,
    width: int,
    grid: Any,
    merge: int,
    bicubic: bool,
    align_corners: bool,
    base: Any,
    base_stride: int,
    base_kind: int,
    out: Any,
    out_kind: int,
    rows: int,
    live_rows: int,
    chunks: int,
) -> None:
    table_bits, base_bits, out_bits = width * units(table_kind), width * units(base_kind), width * units(out_kind)
    for chunk in prange(chunks):
        first_row, end_row = rows * chunk // chunks, rows * (chunk + 1) // chunks
        total = np.empty(width, np.float32)
        y_cells, x_cells = np.empty(4, np.int64), np.empty(4, np.int64)
        y_weights, x_weights = np.empty(4, np.float64), np.empty(4, np.float64)
        image, image_start, image_end = -1, 0, 0
        h = w = 1
        for row in range(first_row, end_row):
            result = out[row * out_bits : (row + 1) * out_bits]
            if row >= live_rows:
                result[:] = 0
                continue
            while row >= image_end:
                image += 1
                h, w = grid[image, 1], grid[image, 2]
                image_start, image_end = image_end, image_end + grid[image, 0] * h * w
            # Inside a frame the rows are in order (h/m, w/m, m, m).
            patch = (row - image_start) % (h * w)
            band, band_patch = patch // (w * merge), patch % (w * merge)
            block, block_patch = band_patch // (merge * merge), band_patch % (merge * merge)
            y, x = band * merge + block_patch // merge, block * merge + block_patch % merge
            taps = _axis(y, h, table_rows, bicubic, align_corners, y_cells, y_weights)
            _axis(x, w, table_columns, bicubic, align_corners, x_cells, x_weights)
            total[:] = 0
            for i in range(taps):
                for j in range(taps):
                    weight = y_weights[i] * x_weights[j]
                    if weight != 0:  # else a NaN or Inf there must not reach the sum
                        at = (y_cells[i] * table_columns + x_cells[j]) * table_stride
                        _add(table_kind, table[at : at + table_bits], np.float32(weight), total)
            if base.size:
                at = row * base_stride
                _add(base_kind, base[at : at + base_bits], np.float32(1.0), total)
            encode(out_kind, total, result)
