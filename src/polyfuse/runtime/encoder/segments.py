"""Tables of a packed batch computed on the device from its grid, and attention inside its segments.

Every function has static shapes and, except for attention on the CPU, no host reads: it can be captured in a graph and
replayed with another grid. A grid is `[items, 3]`: frames, patch rows and patch columns of each item, with unused
items zero and last.
"""

from importlib.util import find_spec
from itertools import pairwise

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention


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


def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of every row to the rows of its own segment.

    `query`, `key` and `value` are `[rows, heads, head_dim]`, `boundaries` `[segments + 1]` int32 from 0, not falling;
    `longest` is a limit of a segment's rows. Rows past the last boundary belong to no segment: what they hold reaches
    no other row, and what they get is undefined. `scale` defaults to `head_dim ** -0.5`.

    On CUDA in half precision this is `triton_attention` for head dims that FlashAttention-2 pads, else PyTorch's
    variable-length FlashAttention. The CPU goes segment by segment; any other device, and any other dtype, takes one
    masked attention over all rows. Under torch.compile it is one opaque operation.
    """
    return _segment_attention(
        query, key, value, boundaries, longest, query.shape[-1] ** -0.5 if scale is None else scale
    )


@torch.library.custom_op("polyfuse::segment_attention", mutates_args=())
def _segment_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        if _is_padded(query.shape[-1]) and find_spec("triton") is not None:
            from polyfuse.runtime.triton_attention import triton_attention

            return triton_attention(query, key, value, boundaries, scale)
        out = varlen_attn(query, key, value, boundaries, boundaries, longest, longest, scale=scale)
        return out if isinstance(out, torch.Tensor) else out[0]
    if query.device.type == "cpu":
        return _attention_by_segment(query, key, value, boundaries, scale)
    return masked_attention(query, key, value, boundaries, scale)


@_segment_attention.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def _is_padded(head_dim: int) -> bool:
    """FlashAttention-2 computes in multiples of 32 columns; `triton_attention` takes multiples of 8 from 16 to 128."""
    return head_dim % 32 != 0 and head_dim % 8 == 0 and 16 <= head_dim <= 128


def _attention_by_segment(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, scale: float
) -> torch.Tensor:
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    for start, end in pairwise(boundaries.tolist()):
        if end > start:
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
            out[start:end] = scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)
    return out


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """`segment_attention` as one attention under a block-diagonal mask of `[rows, rows]`, for any device.

    Unlike the others it lets a NaN or Inf in one segment reach the other segments (not one in the unused rows).
    """
    index = torch.arange(len(query), device=query.device, dtype=boundaries.dtype)
    segment = torch.searchsorted(boundaries, index, right=True)
    used = (index < boundaries[-1])[:, None, None]
    # A masked key still meets its value, and zero times NaN is NaN.
    q, k, v = (torch.where(used, x, 0).transpose(0, 1)[None] for x in (query, key, value))
    mask = segment[:, None] == segment[None, :]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1).contiguous()
