"""The Triton backend of `pos_embed_interpolate`: one launch for all images of a grid on the device.

A program computes a few consecutive rows, neighbours in the image, so that the table rows they share are read
from L1. Index arithmetic is exact, by unsigned integer division, and done once per row.

The images of a grid on the host are arguments of the kernel, up to 16 in a launch: nothing is copied to the device, so
that the host never waits for it, and a captured graph holds the images itself.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import isqrt
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from polyfuse._torch.memory import new
from polyfuse.triton_impl._common import INTERPRETED, capability, cdiv, next_power_of_2, round_to, widen
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl._plans import Plan, Plans, Step, Taken, adjacent
from polyfuse.triton_impl._tuning import Ranges, Tiles, Values

NAME = "pos_embed_interpolate"

CAPABILITY = capability()

# Up to this many rows: rows per program, most column blocks per program. Small results need many programs.
RANGES: Ranges = ((2048, (16, 1)), (2**63, (32, 6)))
BLOCK_BYTES = 128  # of a table row, read at a time: one cache line, 16 bytes for each of 8 lanes
if INTERPRETED.value:  # it pays per operation, not per element
    RANGES, BLOCK_BYTES = ((2**63, (256, 1)),), 4096
BLOCK_IMAGES = 32
WIDE_ROWS = 2**30  # from here on row numbers are 64-bit
ARGUMENTS = tl.constexpr(16)  # images of a host grid that one launch takes
# How an image lies in one of them: its width, its height, the row behind its last one, and a 1 that makes all 64-bit.
HEIGHT_AT = tl.constexpr(15)
ROW_AT = tl.constexpr(30)
ONE_AT = tl.constexpr(62)
SIDES = tl.constexpr(2**15)  # that a height and a width are below
ROWS = tl.constexpr(2**32)


@triton.jit
def _source(index, size, SIDE: tl.constexpr, ALIGN_CORNERS: tl.constexpr):
    """Floor and fraction of the source coordinate of positions `index` on an axis of `size` over SIDE cells."""
    if ALIGN_CORNERS:
        numerator = index * (SIDE - 1)
        denominator = tl.maximum(size - 1, 1)
    else:  # one cell up, which keeps the numerator positive
        numerator = (2 * index + 1) * SIDE + size
        denominator = 2 * size
    cell = numerator // denominator
    fraction = tl.div_rn((numerator - cell * denominator).to(tl.float32), denominator.to(tl.float32))
    return cell.to(tl.int32) - (0 if ALIGN_CORNERS else 1), fraction


@triton.jit
def _weights(f, BICUBIC: tl.constexpr):
    g = 1.0 - f
    if BICUBIC:
        near_f = tl.fma(-1.25 * f, f, 1.0 + f)
        near_g = tl.fma(-1.25 * g, g, 1.0 + g)
        return -0.75 * f * (g * g), g * near_f, f * near_g, -0.75 * g * (f * f)
    else:
        return g, f


@triton.jit
def _locate(
    row,
    grid_ptr,
    images,
    image_stride,
    value_stride,
    rows,
    SIDE: tl.constexpr,
    MERGE: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """Each row's image and that image's first row; the rows of all images, `rows + 1` if one is invalid.

    SIDE is the longer one of the table.
    """
    image = row.to(tl.int32) * 0
    start = row * 0
    total = rows.to(tl.int64) * 0
    broken = images * 0
    first = images * 0
    while first < images:
        index = first + tl.arange(0, IMAGES)  # [IMAGES]
        listed = index < images
        entry = grid_ptr + index.to(tl.int64) * image_stride
        t = tl.load(entry, mask=listed, other=0).to(tl.int64)
        h = tl.load(entry + value_stride, mask=listed, other=0).to(tl.int64)
        w = tl.load(entry + 2 * value_stride, mask=listed, other=0).to(tl.int64)
        valid = (tl.minimum(t, tl.minimum(h, w)) > 0) & (h % MERGE == 0) & (w % MERGE == 0)
        valid = valid & (tl.maximum(h, w) < (2**31 - 1) // (2 * SIDE))
        # Estimated first: the product itself may pass 2**63.
        valid = valid & (t.to(tl.float32) * (h * w).to(tl.float32) < 2.0 * rows.to(tl.float32) + 2.0)
        wrong = ((t | h | w) != 0) & (valid == 0)
        broken = tl.maximum(broken, tl.max(wrong.to(tl.int32), 0))
        size = tl.where(valid, t * h * w, 0)
        end = tl.minimum(total + tl.cumsum(size, 0), rows.to(tl.int64) + 1).to(row.dtype)
        before = end[None, :] <= row[:, None]  # [BLOCK_ROWS, IMAGES]
        image += tl.sum(before.to(tl.int32), 1)
        start = tl.maximum(start, tl.max(tl.where(before, end[None, :], 0), 1))
        total += tl.sum(size, 0)
        first += IMAGES
    return image, start, tl.where(broken == 0, total, rows.to(tl.int64) + 1)


@triton.jit
def _look_up(row, packed):
    """Each row's image among those that `_pack` made: its first row, height and width."""
    start = row * 0
    height = start.to(tl.uint32)
    width = start.to(tl.uint32)
    end = start
    for i in tl.static_range(ARGUMENTS):
        past = row >= end  # all images before this one
        start = tl.where(past, end, start)
        height = tl.where(past, ((packed[i] >> HEIGHT_AT) % SIDES).to(tl.uint32), height)
        width = tl.where(past, (packed[i] % SIDES).to(tl.uint32), width)
        end = start * 0 + ((packed[i] >> ROW_AT) % ROWS).to(row.dtype)
    return start, height, width


NUMBERS = ["rows", "height", "width", "used", "images", "image_stride", "value_stride"]
NUMBERS += [f"image_{i}" for i in range(ARGUMENTS.value)]


@triton.jit(do_not_specialize=NUMBERS)
def _kernel(
    table_ptr,  # [NH*N, D]
    grid_ptr,  # [images, 3], or None for images of the host that fill `used` rows
    base_ptr,  # [rows, D] or None
    out_ptr,  # [rows, D]
    rows,
    height,
    width,
    used,
    images,
    image_stride,
    value_stride,
    image_0,  # of several images of the host; None for one of height x width
    image_1,
    image_2,
    image_3,
    image_4,
    image_5,
    image_6,
    image_7,
    image_8,
    image_9,
    image_10,
    image_11,
    image_12,
    image_13,
    image_14,
    image_15,
    table_stride,
    base_stride,
    D: tl.constexpr,
    NH: tl.constexpr,
    N: tl.constexpr,
    MERGE: tl.constexpr,
    BICUBIC: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr,
    IMAGES: tl.constexpr,
):
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.uint32
    SIDE: tl.constexpr = NH if NH > N else N
    CELL: tl.constexpr = tl.int64 if NH * N >= 2**31 else tl.int32
    TAPS: tl.constexpr = 4 if BICUBIC else 2
    FIRST_TAP: tl.constexpr = -1 if BICUBIC else 0
    ACROSS: tl.constexpr = (D + BLOCK_D * BLOCKS - 1) // (BLOCK_D * BLOCKS)  # programs side by side
    program = tl.program_id(0)
    row = (program // ACROSS).to(INDEX) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(INDEX)  # [BLOCK_ROWS]

    if grid_ptr is None:
        live = row < used
        fill = 0.0
        if image_0 is None:
            image_row = row
            h = height.to(tl.uint32)
            w = width.to(tl.uint32)
        else:
            low = (image_0, image_1, image_2, image_3, image_4, image_5, image_6, image_7)
            high = (image_8, image_9, image_10, image_11, image_12, image_13, image_14, image_15)
            start, h, w = _look_up(row, low + high)
            image_row = row - start
    else:
        image, start, total = _locate(row, grid_ptr, images, image_stride, value_stride, rows, SIDE, MERGE, IMAGES)
        live = row < tl.where(total > rows, 0, total)
        image_row = row - start
        entry = grid_ptr + image.to(tl.int64) * image_stride
        h = tl.load(entry + value_stride, mask=live, other=0).to(tl.uint32)
        w = tl.load(entry + 2 * value_stride, mask=live, other=0).to(tl.uint32)
        # Rows that are not live sum nothing but this.
        fill = tl.where(total > rows, float("nan"), 0.0)
    h = tl.maximum(h, MERGE)  # padding rows divide by it
    w = tl.maximum(w, MERGE)

    patch = image_row % (h.to(INDEX) * w.to(INDEX))
    band_size = w.to(INDEX) * MERGE
    band = patch // band_size
    band_patch = patch - band * band_size
    block_patch = band_patch % (MERGE * MERGE)
    y = band * MERGE + block_patch // MERGE
    x = band_patch // (MERGE * MERGE) * MERGE + block_patch % MERGE
    y_cell, y_fraction = _source(y.to(tl.uint32), h, NH, ALIGN_CORNERS)
    x_cell, x_fraction = _source(x.to(tl.uint32), w, N, ALIGN_CORNERS)
    y_weights = _weights(y_fraction, BICUBIC)
    x_weights = _weights(x_fraction, BICUBIC)

    out_row = out_ptr + row.to(tl.int64) * D
    first_column = program % ACROSS * (BLOCKS * BLOCK_D) + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    for block in tl.static_range(BLOCKS):
        column = (first_column + block * BLOCK_D)[None, :]
        inside = column < D if D % BLOCK_D != 0 else True
        if base_ptr is None:
            acc = tl.full([BLOCK_ROWS, BLOCK_D], 0.0, tl.float32) + fill
        else:
            base_row = base_ptr + row.to(tl.int64) * base_stride
            mask = live[:, None] & inside
            base = tl.load(base_row[:, None] + column, mask=mask, other=fill, eviction_policy="evict_first")
            acc = widen(base)
        for i in tl.static_range(TAPS):
            y_tap = tl.minimum(tl.maximum(y_cell + (FIRST_TAP + i), 0), NH - 1).to(CELL)
            for j in tl.static_range(TAPS):
                x_tap = tl.minimum(tl.maximum(x_cell + (FIRST_TAP + j), 0), N - 1)
                table_row = table_ptr + (y_tap * N + x_tap).to(tl.int64) * table_stride
                weight = y_weights[i] * x_weights[j]
                # A tap of zero weight is not read: a NaN or Inf there must not reach the sum.
                mask = (live & (weight != 0.0))[:, None] & inside
                value = tl.load(table_row[:, None] + column, mask=mask, other=0.0)
                acc = tl.fma(weight[:, None], widen(value), acc)
        result = round_to(acc, out_ptr.dtype.element_ty)
        tl.store(out_row[:, None] + column, result, mask=(row < rows)[:, None] & inside, cache_modifier=".cs")


_launch = Launcher(NAME, _kernel)
TILES = Tiles(_launch, ("block_rows", "most_blocks"), RANGES, ((8, 16, 32, 64), (1, 2, 3, 6, 9)))


def _blocks(width: int, itemsize: int, most: int) -> tuple[int, int]:
    """Columns per block, and blocks per program so that programs side by side do equal work."""
    block = min(BLOCK_BYTES // itemsize, next_power_of_2(width))
    across = cdiv(width, block)
    return block, max(n for n in range(1, most + 1) if across % n == 0)


class _Piece(NamedTuple):
    """What one launch computes: rows of the result, from the first one on, and the kernel's numbers for its images."""

    first: int
    rows: int
    height: int = 0
    width: int = 0
    used: int = 0
    packed: tuple[int | None, ...] = (None,) * ARGUMENTS.value


@lru_cache(maxsize=256)
def _pieces(grid: tuple[tuple[int, int, int], ...], out_rows: int | None) -> tuple[_Piece, ...]:
    """The launches for images on the host; the last one computes the rows past all images too."""
    images = [(t * h * w, h, w) for t, h, w in grid if t]
    pieces, first = [], 0
    while images:
        count = next(n for n in range(min(len(images), ARGUMENTS.value), 0, -1) if n == 1 or _packable(images[:n]))
        taken, images = images[:count], images[count:]
        used = sum(rows for rows, _, _ in taken)
        one = (*taken[0][1:], used) if count == 1 else (0, 0, used, _pack(taken))
        pieces.append(_Piece(first, used, *one))
        first += used
    if not pieces:
        return (_Piece(0, out_rows or 0),)
    if out_rows is not None:
        pieces[-1] = pieces[-1]._replace(rows=out_rows - pieces[-1].first)
    return tuple(pieces)


def _packable(images: Sequence[tuple[int, int, int]]) -> bool:
    side, rows = max(max(h, w) for _, h, w in images), sum(rows for rows, _, _ in images)
    return side < SIDES.value and rows < ROWS.value


def _pack(images: Sequence[tuple[int, int, int]]) -> tuple[int, ...]:
    """The images as arguments of the kernel; those that are left over begin behind the last row."""
    packed, end = [], 0
    for rows, h, w in [*images, *[(0, 0, 0)] * (ARGUMENTS.value - len(images))]:
        end += rows
        packed.append(1 << ONE_AT.value | end << ROW_AT.value | h << HEIGHT_AT.value | w)
    return tuple(packed)


def _plan(
    inputs: tuple[Any, ...],
    merge_size: int,
    bicubic: bool,
    align_corners: bool,
    table_height: int | None,
    tile: Values,
    wide: tuple[bool, bool, bool],
    single: bool,
) -> Plan:
    """How calls with such inputs, in the order of the kernel's parameters, are launched, whatever their images are.

    `wide` says whether rows are numbered in 64 bits, and whether the numbers of all rows and of the used ones take as
    many; `single` whether the images are no arguments of their own. Kept are the rows of a program, how many programs
    lie side by side, and the strides of the grid.
    """
    taken = Taken(inputs, {0: adjacent, 2: adjacent})
    table, grid, base, _ = taken.ready
    cells, columns = table.shape
    block_rows, most_blocks = tile
    block_columns, blocks = _blocks(columns, table.element_size(), most_blocks)
    side = isqrt(cells) if table_height is None else table_height
    strides = (0, 0) if grid is None else grid.stride()
    fixed = (
        *(table.stride(0), 0 if base is None else base.stride(0), columns, side, cells // side, merge_size, bicubic),
        *(align_corners, wide[0], block_rows, block_columns, blocks, BLOCK_IMAGES),
    )
    own, used = (2**31 if is_wide else 1 for is_wide in wide[1:])
    numbers = own, 1, 1, used, 1, *strides, *[None if single else 2**ONE_AT.value] * ARGUMENTS.value
    # Two rows of 16 taps a thread would take 200 registers.
    step = Step(_launch, (1, 1, 1), taken, numbers, fixed, warps=8 if bicubic else 4)
    return Plan(taken, step, kept=(block_rows, -(-columns // (block_columns * blocks)), strides))


# The result is looked at as the inputs are: its dtype may be any of them, and a part of it begins anywhere.
_plans = Plans(_plan, free=(1, 2, 3))


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
    """Returns [rows, D], rounded once."""
    grid: torch.Tensor | None = None
    images = 0
    if isinstance(grid_thw, torch.Tensor):
        grid = grid_thw
        images = len(grid)
        pieces: tuple[_Piece, ...] = (_Piece(0, out_rows or 0),)
    else:
        pieces = _pieces(tuple((t, h, w) for t, h, w in grid_thw), out_rows)
    rows = pieces[-1].first + pieces[-1].rows
    columns = table.shape[1]
    dtype = getattr(torch, out_dtype) if out_dtype else (table if base is None else base).dtype
    (out,) = new(table.device, ((rows, columns), dtype))
    if rows == 0 or columns == 0:
        return out
    settings = merge_size, mode == "bicubic", align_corners, table_height
    for first, own, height, width, used, packed in pieces:
        part, part_base = out, base
        if len(pieces) > 1:
            part, part_base = out[first : first + own], base if base is None else base[first : first + own]
        inputs = table, grid, part_base, part
        wide = own >= WIDE_ROWS, own >= 2**31, used >= 2**31
        plan, addresses = _plans(inputs, *settings, TILES.choose(own, table.device), wide, packed[0] is None)
        block_rows, across, strides = plan.kept
        programs = -(-own // block_rows) * across, 1, 1
        numbers = own, height, width, used, images, *strides, *packed
        plan(inputs, addresses, (), grid=programs, numbers=numbers)
    return out
