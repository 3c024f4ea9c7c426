"""Tables of windowed attention over a packed batch, computed on the device from its grid.

Each frame is cut into windows of `window_side x window_side` tokens, smaller at its right and lower edge, and the
tokens are put in window order: windows by rows, the tokens of each by rows. A token is a `merge_size x merge_size`
block of patches. Grids are those of `polyfuse.runtime.encoder.segments`, and so are the rules: static shapes, and no
host reads.
"""

import torch


def max_windows(tokens: int, frames: int, window_side: int) -> int:
    """The most windows of `window_side` squared tokens that `frames` frames of `tokens` tokens in all can have."""
    # With s = window_side, a frame of a x b windows has at least ((a-1)s + 1)((b-1)s + 1) >= (ab-1)s + 1 tokens.
    # So a frame of n tokens has ab <= (n-1)/s + 1 = (n + s - 1)/s windows; sum over the frames.
    return (tokens + frames * (window_side - 1)) // window_side


def window_tables(
    grid: torch.Tensor, tokens: int, windows: int, window_side: int, merge_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The window order of the tokens, and where its windows begin.

    Returns `permutation` `[tokens]` int64, the token at each place in window order, and `boundaries` `[windows + 1]`
    int32, cumulative patches at the start of every window. A frame's tokens stay in its own places. Unused tokens stay
    where they are; unused windows are empty, at the end. `windows` must be at least the windows of the grid:
    `max_windows` is.
    """
    frames, heights, widths = grid[:, 0], grid[:, 1] // merge_size, grid[:, 2] // merge_size
    down, across = (heights + window_side - 1) // window_side, (widths + window_side - 1) // window_side
    token_ends, window_ends = (frames * heights * widths).cumsum(0), (frames * down * across).cumsum(0)
    total = token_ends[-1]

    window = torch.arange(windows, device=grid.device)
    item = torch.searchsorted(window_ends, window, right=True)
    used = item < len(grid)
    item = item.clamp(max=len(grid) - 1)
    height, width, rows, columns = (x[item].clamp(min=1) for x in (heights, widths, down, across))
    within = window - window_ends[item] + (frames * down * across)[item]
    frame, place = within // (rows * columns), within % (rows * columns)
    top, left = place // columns * window_side, place % columns * window_side
    # Before a window lie the windows above it, as wide as the frame, and those to its left, as high as itself.
    above = token_ends[item] - (frames * heights * widths)[item] + frame * height * width + top * width
    start = torch.where(used, above + left * (height - top).clamp(max=window_side), total)
    corner, span = above + left, (width - left).clamp(max=window_side)

    index = torch.arange(tokens, device=grid.device)
    own = torch.searchsorted(start, index, right=True) - 1
    offset = index - start[own]
    token = corner[own] + offset // span[own] * width[own] + offset % span[own]
    boundaries = torch.cat((start, total[None])) * merge_size**2
    return torch.where(index < total, token, index), boundaries.to(torch.int32)
