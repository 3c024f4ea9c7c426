"""How programs share out the rows of experts, whose numbers only the device knows.

A program adds up the rows of all experts once, to find the one expert whose tiles it takes. An expert has the more
programs the more valid rows it has, so that none has many more tiles than others; one without rows has none. To add up
thousands takes longer than what that saves: if these have an array each, all have the same number of programs. And
where all rows before the last expert's end are valid, they are shared out as if they were one expert's.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

PROGRAMS = 8  # of one multiprocessor, and one more for each expert, as the last program of each may have few tiles
CHUNKS = (32, 256, 1024)  # experts that a program looks at together: one warp alone can, or in a few registers
WIDEST = tl.constexpr(CHUNKS[-1])
MOST_TILES = 32  # of a program, if all experts have the same number of programs
STAGES = tl.constexpr(2)


@triton.jit
def _rows(num_rows_ptr, ends_ptr, expert, experts, rows, ALIGNMENT: tl.constexpr):
    """The first row of each expert, counted from where it begins or else from the first of all, and how many it has."""
    known = expert < experts
    if num_rows_ptr is not None:
        count = tl.minimum(tl.load(num_rows_ptr + expert, mask=known, other=0), rows)
        return (expert * 0).to(tl.int64), tl.maximum(count, 0)
    else:
        before = tl.load(ends_ptr + expert - 1, mask=known & (expert > 0), other=0).to(tl.int64)
        first = tl.maximum((before + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT, 0)
        end = tl.minimum(tl.load(ends_ptr + expert, mask=known, other=0), rows)
        return first, tl.maximum(end - first, 0)


@triton.jit
def _tiles(count, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    return ((count.to(tl.int64) * PAIRS + BLOCK - 1) // BLOCK).to(tl.int32)


@triton.jit
def each_tile(
    run: tl.constexpr,  # takes the number of a tile in its expert, the expert, its first row and its rows, `arguments`
    arguments,
    num_rows_ptr,  # [experts], or None
    ends_ptr,  # [experts], or None; with neither, all rows are valid, and a program has one tile
    rows,
    experts,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,  # 0: all experts have the same number of programs
    PAIRS: tl.constexpr,  # of a row
    BLOCK: tl.constexpr,  # pairs of a tile
):
    """Calls `run` for the tiles of this program. The expert is 0 where experts' rows lie in one array.

    Inside the loop over them nothing is left of the search, so that they take no more registers than a single tile.
    """
    zero = tl.full([], 0, tl.int64)
    if num_rows_ptr is None and ends_ptr is None:
        run(tl.program_id(0), zero, zero, rows, *arguments)
    elif ends_ptr is not None and ALIGNMENT == 1:
        valid = tl.maximum(tl.minimum(tl.load(ends_ptr + experts - 1), rows), 0)
        step = tl.num_programs(0)
        left = tl.maximum(_tiles(valid, PAIRS, BLOCK) - tl.program_id(0), 0)
        for i in tl.range(0, tl.cdiv(left, step), num_stages=STAGES):
            run(tl.program_id(0) + i * step, zero, zero, valid, *arguments)
    elif CHUNK == 0:
        step = tl.num_programs(0) // experts
        expert = tl.program_id(0) // step
        first, valid = _rows(num_rows_ptr, ends_ptr, expert, experts, rows, ALIGNMENT)
        start = tl.program_id(0) % step
        left = tl.maximum(_tiles(valid, PAIRS, BLOCK) - start, 0)
        for i in tl.range(0, tl.cdiv(left, step), num_stages=STAGES):
            run(start + i * step, expert.to(tl.int64), first, valid, *arguments)
    else:
        place = tl.arange(0, CHUNK)
        looked_at = CHUNK if CHUNK < WIDEST else experts
        total = experts * 0
        for begin in tl.range(0, looked_at, CHUNK):
            _, count = _rows(num_rows_ptr, ends_ptr, begin + place, experts, rows, ALIGNMENT)
            total += tl.sum(_tiles(count, PAIRS, BLOCK), 0)
        programs = tl.num_programs(0)
        # Tiles of a program, at most. The last program of each expert may have few: there are `experts` more for them.
        most = tl.where(total <= programs, 1, tl.cdiv(total, tl.maximum(programs - experts, 1)))
        program = tl.program_id(0)
        expert = experts * 0
        before = experts * 0
        taken = experts * 0
        for begin in tl.range(0, looked_at, CHUNK):
            _, count = _rows(num_rows_ptr, ends_ptr, begin + place, experts, rows, ALIGNMENT)
            ends = taken + tl.cumsum(tl.cdiv(_tiles(count, PAIRS, BLOCK), most), 0)
            expert += tl.sum((ends <= program).to(tl.int32), 0)
            before = tl.maximum(before, tl.max(tl.where(ends <= program, ends, 0), 0))
            taken = tl.max(ends, 0)
        first, valid = _rows(num_rows_ptr, ends_ptr, expert, experts, rows, ALIGNMENT)  # none, past the last expert
        tiles = _tiles(valid, PAIRS, BLOCK)
        step = tl.maximum(tl.cdiv(tiles, most), 1)
        start = program - before
        own = zero if num_rows_ptr is None else expert.to(tl.int64)
        for i in tl.range(0, tl.cdiv(tl.maximum(tiles - start, 0), step), num_stages=STAGES):
            run(start + i * step, own, first, valid, *arguments)


class Shares(NamedTuple):
    """How many programs share out the rows, of how many experts, and the CHUNK of `each_tile`."""

    programs: int
    experts: int
    chunk: int


def share_out(
    device: torch.device, experts: int, rows: int, masked: bool, ends: int | None, pairs: int, block: int
) -> Shares:
    """For `rows` of each of so many experts, of which some are not valid if `masked`, or of `ends` experts together."""
    own = -(-rows * pairs // block)  # tiles of an expert with an array of its own, at most
    if masked and experts > CHUNKS[-1]:
        programs = max(-(-_most_programs(device) // experts), -(-own // MOST_TILES))
        return Shares(experts * min(own, programs), experts, 0)
    tiles = experts * own
    if ends is not None:
        tiles = min(tiles + ends, rows * pairs) if ends else 0
        experts = ends
    if masked or ends is not None:
        tiles = min(tiles, _most_programs(device) + experts)
    return Shares(tiles, experts, next((chunk for chunk in CHUNKS if experts <= chunk), CHUNKS[-1]))


@cache
def _most_programs(device: torch.device) -> int:
    if device.type not in ("cuda", "xpu"):
        return 3
    properties: Any = torch.get_device_module(device).get_device_properties(device)
    units = properties.multi_processor_count if device.type == "cuda" else properties.gpu_subslice_count
    return int(units) * PROGRAMS
