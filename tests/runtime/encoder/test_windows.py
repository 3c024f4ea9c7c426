"""Window tables against Transformers' own, for every padding of the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfuse.runtime.encoder.windows import max_windows, window_tables

transformers = pytest.importorskip("transformers.vision_utils")

SIDES = st.integers(1, 5)
MERGES = st.integers(1, 3)
TOKEN_GRIDS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11)), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(TOKEN_GRIDS, SIDES, MERGES, st.integers(0, 3), st.integers(0, 9), st.integers(0, 3))
def test_transformers_order_and_boundaries_in_any_capacity(
    items: list[tuple[int, int, int]], side: int, merge: int, more_items: int, more_tokens: int, more_frames: int
) -> None:
    used = torch.tensor([[t, h * merge, w * merge] for t, h, w in items])
    order, edges = transformers.get_vision_window_index(used, merge, side * merge, patch_size=1)
    tokens, frames = len(order) + more_tokens, int(used[:, 0].sum()) + more_frames
    windows = max_windows(tokens, frames, side)

    grid = torch.cat((used, used.new_zeros(more_items, 3)))
    permutation, boundaries = window_tables(grid, tokens, windows, side, merge)

    assert (permutation.dtype, boundaries.dtype) == (torch.int64, torch.int32)
    assert permutation.tolist() == [*order.tolist(), *range(len(order), tokens)]
    assert len(edges) <= windows + 1
    assert boundaries.tolist() == edges.tolist() + [int(edges[-1])] * (windows + 1 - len(edges))


def test_a_grid_by_hand() -> None:
    grid = torch.tensor([[1, 6, 6], [2, 2, 4], [0, 0, 0]])  # tokens: one frame 3 x 3, two frames 1 x 2
    permutation, boundaries = window_tables(grid, tokens=15, windows=8, window_side=2, merge_size=2)
    assert permutation.tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert boundaries.tolist() == [0, 16, 24, 32, 36, 44, 52, 52, 52]


def test_an_empty_batch_keeps_every_place() -> None:
    permutation, boundaries = window_tables(torch.zeros(2, 3, dtype=torch.int64), 6, 4, 4, 2)
    assert permutation.tolist() == [0, 1, 2, 3, 4, 5]
    assert boundaries.tolist() == [0, 0, 0, 0, 0]


def test_nothing_is_read_from_the_device() -> None:
    """A tensor without data raises where its values are asked for."""
    permutation, boundaries = window_tables(torch.empty(3, 3, dtype=torch.int64, device="meta"), 40, 9, 4, 2)
    assert (permutation.shape, boundaries.shape) == ((40,), (10,))


@pytest.mark.parametrize("side", range(1, 7))
def test_no_frame_has_more_windows_than_the_limit(side: int) -> None:
    for height in range(1, 20):
        for width in range(1, 20):
            windows = -(-height // side) * -(-width // side)
            assert windows <= max_windows(height * width, 1, side)
    for tokens in range(1, 20):
        assert max_windows(tokens, 1, side) == -(-tokens // side)  # reached by a strip
        assert max_windows(tokens, tokens, side) == tokens  # reached by frames of one token


def test_the_limit_is_reached_by_strips_of_one_token_too_many() -> None:
    grid = torch.tensor([[3, 1, 5]])
    windows = max_windows(15, 3, 4)
    assert windows == 6
    assert window_tables(grid, 15, windows, 4, 1)[1].tolist() == [0, 4, 5, 9, 10, 14, 15]
