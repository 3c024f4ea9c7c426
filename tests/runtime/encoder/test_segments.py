"""Tables of a packed batch against Transformers' host versions."""

import pytest
import torch

from polyfuse.runtime.encoder.segments import frame_boundaries, patch_positions

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
GRIDS = [[[1, 4, 6]], [[3, 2, 8], [1, 10, 14], [2, 6, 2]], [[1, 2, 2]] * 5]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("unused", [0, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=len)
def test_tables_equal_transformers(grid: list[list[int]], unused: int, device: str) -> None:
    vision = pytest.importorskip("transformers.vision_utils")
    given = torch.tensor(grid)
    padded = torch.cat((given, given.new_zeros(unused, 3))).to(device)
    rows, frames = int(given.prod(-1).sum()), int(given[:, 0].sum())
    positions = patch_positions(padded, rows + 4 * unused, 2).cpu()
    assert torch.equal(positions[:rows], vision.get_vision_position_ids(given, 2))
    assert not positions[rows:].any()
    boundaries = frame_boundaries(padded, frames + unused).cpu()
    assert boundaries.dtype == torch.int32
    assert torch.equal(boundaries[: frames + 1], vision.get_vision_cu_seqlens(given))
    assert boundaries[frames:].eq(rows).all()


def test_an_empty_grid_has_empty_tables() -> None:
    grid = torch.zeros(2, 3, dtype=torch.int64)
    assert frame_boundaries(grid, 3).tolist() == [0, 0, 0, 0]
    assert not patch_positions(grid, 8, 2).any()
