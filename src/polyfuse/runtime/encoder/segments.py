"""Tables of a packed batch computed on the device from its grid.

Every function has static shapes and no host reads: it can be captured in a graph and replayed with another grid. A
grid is `[items, 3]`: frames, patch rows and patch columns of each item, with unused items zero and last.
"""

import torch
from torch.nn.functional import pad


def frame_boundaries(grid: torch.Tensor, frames: int) -> torch.Tensor:
    """How many patches lie before every frame of a grid `[items, 3]`, integers: `[frames + 1]` int32.

    Frames that the grid does not have are empty, at the end.
    """
    ends = grid[:, 0].cumsum(0)
    index = torch.arange(frames, device=grid.device, dtype=ends.dtype)
    item = torch.searchsorted(ends, index, right=True)
    patches = (grid[:, 1] * grid[:, 2])[item.clamp(max=len(grid) - 1)]
    lengths = torch.where(item < len(grid), patches, 0)
    return pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def patch_positions(grid: torch.Tensor, rows: int, merge_size: int) -> torch.Tensor:
    """The (row, column) of each patch in its frame, for a grid `[items, 3]`, integers: `[rows, 2]` int64.

    Patches are in spatial-merge order: `merge_size x merge_size` blocks by rows, and by rows inside. Unused rows are
    (0, 0).
    """
    counts = grid.prod(-1)
    ends = counts.cumsum(0)
    index = torch.arange(rows, device=grid.device, dtype=ends.dtype)
    item = torch.searchsorted(ends, index, right=True)
    used = item < len(grid)
    item = item.clamp(max=len(grid) - 1)
    height, width = grid[item, 1].clamp(min=1), grid[item, 2].clamp(min=merge_size)
    within = (index - ends[item] + counts[item]) % (height * width)
    block, inner = within // merge_size**2, within % merge_size**2
    row = block // (width // merge_size) * merge_size + inner // merge_size
    column = block % (width // merge_size) * merge_size + inner % merge_size
    return torch.where(used[:, None], torch.stack((row, column), -1), 0)
