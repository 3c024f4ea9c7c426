"""Programs share out the tiles of experts: each tile has one program, and no program many more than others."""

from math import ceil
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from polyfuse.triton_impl import _experts
from polyfuse.triton_impl._experts import WIDEST, Shares, each_tile, share_out
from tests.triton_impl.helpers import DEVICE

BLOCK, PAIRS = 4, 3  # of a tile, of a row
TILES = 32  # that an expert has at most, or all experts together


@triton.jit
def _note(tile, expert, first, valid, taken_ptr, first_ptr, valid_ptr, by_ptr, LIMIT: tl.constexpr):
    at = expert * LIMIT + first * 3 + tile
    tl.atomic_add(taken_ptr + at, 1)
    tl.store(first_ptr + at, first)
    tl.store(valid_ptr + at, valid)
    tl.atomic_add(by_ptr + tl.program_id(0), 1)


@triton.jit(do_not_specialize=["rows", "experts"])
def _kernel(
    num_rows_ptr, ends_ptr, taken_ptr, first_ptr, valid_ptr, by_ptr, rows, experts, LIMIT: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    each_tile(
        _note,  # pyright: ignore[reportArgumentType]
        (taken_ptr, first_ptr, valid_ptr, by_ptr, LIMIT), num_rows_ptr, ends_ptr, rows, experts, ALIGNMENT,
        CHUNK, PAIRS, BLOCK,
    )  # fmt: skip


def run(
    rows: int, shares: Shares, num_rows: list[int] | None = None, ends: list[int] | None = None, alignment: int = 1
) -> tuple[dict[tuple[int, int], tuple[int, int]], list[int]]:
    """(tile, first row, rows) by where a tile is noted, and how many tiles each program has."""
    limit = TILES if ends is None else rows * PAIRS
    taken, first, valid = torch.zeros(3, shares.experts * limit, dtype=torch.int32, device=DEVICE)
    by = torch.zeros(shares.programs, dtype=torch.int32, device=DEVICE)
    given = [x if x is None else torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (num_rows, ends)]
    outputs = taken, first, valid, by
    kernel: Any = _kernel
    kernel[shares.programs,](*given, *outputs, rows, shares.experts, limit, PAIRS, BLOCK, alignment, shares.chunk)
    assert taken.max() <= 1
    noted = {divmod(i, limit): (int(first[i]), int(valid[i])) for i in taken.nonzero().flatten().tolist()}
    return noted, by.tolist()


def tiles(rows: int) -> int:
    return ceil(rows * PAIRS / BLOCK)


COUNTS = {
    "none": [0, 0, 0],
    "one_of_many": [0, 40, 0, 0, 0],
    "equal": [8] * 9,
    "uneven": [1, 40, 0, 3, 17, -4, 99, 2],
    "more_experts_than_a_chunk": [2 * (e in (3, 31, 32, 39)) for e in range(40)],
}


@pytest.mark.parametrize("programs", [1, 5, 64])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_valid_rows_of_experts(counts: list[int], programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_experts, "_most_programs", lambda device: programs)
    rows = 40
    shares = share_out(torch.device(DEVICE), len(counts), rows, True, None, PAIRS, BLOCK)
    valid = [min(max(count, 0), rows) for count in counts]
    want = {(e, i): (0, count) for e, count in enumerate(valid) for i in range(tiles(count))}
    noted, by = run(rows, shares, num_rows=counts)
    assert noted == want
    assert max(by) <= max(1, ceil(len(want) / programs))


@pytest.mark.parametrize("alignment", [1, 4, 6])
@pytest.mark.parametrize("ends", [[], [0, 0], [5, 5, 9, 24, 30], [4, 13, 13, 29, 30, 30]], ids=str)
def test_experts_behind_one_another(ends: list[int], alignment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_experts, "_most_programs", lambda device: 4)
    rows = 28
    shares = share_out(torch.device(DEVICE), 1, rows, False, len(ends), PAIRS, BLOCK)
    if not ends:
        assert shares.programs == 0
        return
    want: dict[tuple[int, int], tuple[int, int]] = {}
    before = 0
    for end in ends[-1:] if alignment == 1 else ends:  # all rows lie together, or not
        first = -(-before // alignment) * alignment
        count = max(0, min(end, rows) - first)
        want |= {(0, first * PAIRS + i): (first, count) for i in range(tiles(count))}
        before = end
    noted, by = run(rows, shares, ends=ends, alignment=alignment)
    assert noted == want
    assert max(by) <= max(1, ceil(len(want) / 4))


MANY = WIDEST.value + 6
COUNTS_OF_MANY = [5 * (e in (0, 7, WIDEST.value - 1, WIDEST.value, WIDEST.value + 5)) for e in range(MANY)]
TILES_OF_MANY = {(e, i): (0, 5) for e, count in enumerate(COUNTS_OF_MANY) if count for i in range(tiles(5))}


def test_more_experts_than_a_program_looks_at_together() -> None:
    noted, by = run(5, Shares(21, MANY, WIDEST.value), num_rows=COUNTS_OF_MANY)
    assert noted == TILES_OF_MANY
    assert sorted(by) == [0] + [1] * 20


@pytest.mark.parametrize(("most_tiles", "step"), [(32, 1), (2, 2), pytest.param(1, 4, marks=pytest.mark.slow)])
def test_many_experts_with_as_many_programs_each(most_tiles: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_experts, "MOST_TILES", most_tiles)
    monkeypatch.setattr(_experts, "_most_programs", lambda device: 3)
    shares = share_out(torch.device(DEVICE), MANY, 5, True, None, PAIRS, BLOCK)
    assert shares == Shares(MANY * step, MANY, 0)
    noted, by = run(5, shares, num_rows=COUNTS_OF_MANY)
    assert noted == TILES_OF_MANY
    assert max(by) == tiles(5) / step


def test_as_many_programs_as_there_may_be_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    monkeypatch.setattr(_experts, "_most_programs", lambda device: 100)
    assert share_out(device, 8, 4, True, None, 3, 2) == Shares(8 * 6, 8, 32)
    assert share_out(device, 8, 4000, True, None, 3, 2) == Shares(108, 8, 32)
    assert share_out(device, 1, 4000, False, 300, 3, 2) == Shares(400, 300, 1024)
    assert share_out(device, 1, 4000, False, None, 3, 2) == Shares(6000, 1, 32)
