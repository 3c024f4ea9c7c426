"""`pos_embed_interpolate` in plain PyTorch; the formula is the docstring of `polyfuse.spec.pos_embed_interpolate`.

All images at once, and nothing is read back to the host: a grid on the device can be captured in a CUDA graph.
"""

from collections.abc import Sequence

import torch

from polyfuse.spec import Capability
from polyfuse.spec.pos_embed_interpolate import table_sides

CAPABILITY = Capability(differentiable=True)


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
    cells, width = table.shape
    table_h, table_w = table_sides(cells, table_height)
    dtype = getattr(torch, out_dtype) if out_dtype else (table if base is None else base).dtype
    rows = sum(int(t * h * w) for t, h, w in grid_thw) if out_rows is None else out_rows
    grid = _on_device(grid_thw, table.device)
    if len(grid) == 0:
        return table.new_zeros((rows, width), dtype=dtype)

    h, w, image_row, live, poisoned = _locate(grid, rows, merge_size, max(table_h, table_w))
    y, x = _patch(image_row, h, w, merge_size)
    y_taps = _axis_taps(y, h, table_h, mode, align_corners)
    x_taps = _axis_taps(x, w, table_w, mode, align_corners)
    result = table.new_zeros((rows, width), dtype=torch.float32)
    for y_cell, y_weight in y_taps:
        for x_cell, x_weight in x_taps:
            weight = (y_weight * x_weight).masked_fill(~live, 0.0)[:, None]  # [rows, 1]
            # A tap of zero weight counts as zero: a NaN or Inf there must not reach the sum.
            value = table[y_cell * table_w + x_cell].float().masked_fill(weight == 0, 0.0)
            result.addcmul_(weight, value)
    if base is not None:
        result += base.float().masked_fill(~live[:, None], 0.0)
    return result.masked_fill(poisoned, torch.nan).to(dtype)


def _on_device(grid_thw: Sequence[Sequence[int]] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The grid as int64 on the device, for which neither the host nor the device waits."""
    if isinstance(grid_thw, torch.Tensor) or device.type != "cuda" or len(grid_thw) == 0:
        return torch.as_tensor(grid_thw, dtype=torch.int64, device=device)
    if torch.cuda.is_current_stream_capturing():  # a replay would copy from where the grid no longer is
        sizes = [torch.full((), size, dtype=torch.int64, device=device) for image in grid_thw for size in image]
        return torch.stack(sizes).view(-1, 3)
    return torch.as_tensor(grid_thw, dtype=torch.int64).pin_memory().to(device, non_blocking=True)


def _locate(grid: torch.Tensor, rows: int, merge_size: int, longest: int) -> tuple[torch.Tensor, ...]:
    """Each row's h and w of its image, number in that image and whether it is live; last, whether the grid is invalid.

    A row is live if it belongs to an image of a valid grid. `longest` is the longer side of the table.
    """
    t, h, w = grid.unbind(1)
    valid = (grid.amin(1) > 0) & (h % merge_size == 0) & (w % merge_size == 0)
    valid &= grid[:, 1:].amax(1) < (2**31 - 1) // (2 * longest)
    # Estimated first: the product itself may pass 2**63.
    valid &= t.float() * (h * w).float() < 2.0 * rows + 2.0
    sizes = (t * h * w).masked_fill(~valid, 0)
    ends = sizes.cumsum(0)
    poisoned = (~valid & (grid != 0).any(1)).any() | (ends[-1] > rows)

    row = torch.arange(rows, device=grid.device)
    image = torch.searchsorted(ends, row, right=True).clamp(max=len(grid) - 1)
    live = (row < ends[-1]) & ~poisoned
    image_row = row - (ends - sizes)[image]
    return h[image].clamp(min=merge_size), w[image].clamp(min=merge_size), image_row, live, poisoned


def _patch(image_row: torch.Tensor, h: torch.Tensor, w: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The y and x of each patch; the patches of a frame are in the order (h/m, w/m, m, m)."""
    patch = image_row % (h * w)
    band, band_patch = patch // (w * m), patch % (w * m)
    block, block_patch = band_patch // (m * m), band_patch % (m * m)
    return band * m + block_patch // m, block * m + block_patch % m


def _axis_taps(
    index: torch.Tensor, size: torch.Tensor, side: int, mode: str, align_corners: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The table cells, of `side`, and their weights, that positions `index` on an axis of `size` are made of."""
    if align_corners:
        numerator, denominator = index * (side - 1), (size - 1).clamp(min=1)
    else:
        numerator, denominator = (2 * index + 1) * side - size, 2 * size
    cell = numerator // denominator
    f = (numerator - cell * denominator).float() / denominator.float()
    g = 1 - f
    if mode == "bilinear":
        first, weights = 0, [g, f]
    else:
        a = -0.75
        near_f, near_g = 1 + f - (a + 2) * f * f, 1 + g - (a + 2) * g * g
        first, weights = -1, [a * f * (g * g), g * near_f, f * near_g, a * g * (f * f)]
    return [((cell + first + i).clamp(0, side - 1), weight) for i, weight in enumerate(weights)]
