"""`segment_attention` in PyTorch; the formula is the docstring of `polyfuse.spec.segment_attention`.

CUDA in half precision has a kernel for packed segments, and the CPU, where their ends can be read, goes from one to the
next. Elsewhere blocks of rows meet all rows that may share their segment, under a mask.
"""

from functools import lru_cache
from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention

from polyfuse._torch.projections import is_recorded
from polyfuse.spec import Capability

CAPABILITY = Capability(differentiable=True)

BLOCK_ROWS = 512  # whose scores are held at a time


def segment_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """out [rows, heads, dim], rounded once."""
    rows, _, dim = q.shape
    if not q.numel() or len(cu_seqlens) < 2:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    factor = dim**-0.5 if scale is None else scale
    if q.device.type == "cpu":
        return _by_segment(q, k, v, cu_seqlens, factor)
    longest = rows if max_seqlen is None else min(max_seqlen, rows)
    if _has_varlen_kernel(q) and not is_recorded(q, k, v):
        return _varlen(q, k, v, cu_seqlens, longest, factor)
    return masked(q, k, v, cu_seqlens, longest, factor)


def _has_varlen_kernel(q: torch.Tensor) -> bool:
    """Whether PyTorch's FlashAttention takes such tensors.

    It is for inference: in PyTorch 2.11 on an H200 its gradients are wrong where there is more than one segment.
    """
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    return q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and _runs_flash_attention(q.device)


@lru_cache(maxsize=64)
def _runs_flash_attention(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # it imports triton, which a CPU does not need

    ends = cu_seqlens.to(torch.int32).contiguous()
    out = varlen_attn(aligned(q), aligned(k), aligned(v), ends, ends, longest, longest, scale=scale)
    return out if isinstance(out, torch.Tensor) else out[0]


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x` where every row of every head is in one piece that begins at a multiple of 16 bytes, else a copy that is so.

    The kernel reads so many bytes at a time. `dim` is a multiple of 8, of 16-bit elements.
    """
    *steps, last = x.stride()
    if last == 1 and x.data_ptr() % 16 == 0 and all(step * x.element_size() % 16 == 0 for step in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _by_segment(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """One attention per segment. Rows past the last one get zero."""
    out = torch.zeros(q.shape, dtype=q.dtype)
    finite = torch.stack([x.isfinite().flatten(1).all(1) for x in (q, k, v)]).all(0)  # [rows]
    for start, end in pairwise(cu_seqlens.tolist()):
        if end <= start:
            continue
        rows = slice(start, end)
        if finite[rows].all():
            out[rows] = _fused(q[rows], k[rows], v[rows], scale)
        else:  # of a row that is all NaN PyTorch's kernel makes zeros
            own = cu_seqlens.new_tensor([0, end - start])
            out[rows] = masked(q[rows], k[rows], v[rows], own, end - start, scale)
    return out


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of one segment by PyTorch's own kernel."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, rows, dim]
    return scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)


def masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """Attention in float32 on any device, without a host read.

    A masked score has a weight of 0, and zero times NaN is NaN. So what is not finite in `v` stays out of the product:
    it is added to every row of its segment, where any positive weight of it comes to the same.
    """
    rows, reach = len(q), max(longest, 1) - 1
    segment = torch.searchsorted(
        cu_seqlens.contiguous(), torch.arange(rows, device=q.device).to(cu_seqlens), right=True
    )
    wide_q, wide_k, wide_v = (x.transpose(0, 1).float() for x in (q, k, v))  # [heads, rows, dim]
    finite = torch.where(wide_v.isfinite(), wide_v, 0)
    others = torch.zeros(len(cu_seqlens) + 1, *v.shape[1:], dtype=torch.float32, device=v.device)
    others = others.index_add(0, segment, (wide_v - finite).transpose(0, 1))
    blocks = []
    for start in range(0, rows, BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, rows)
        near = slice(max(0, start - reach), min(rows, end + reach))
        scores = wide_q[:, start:end] @ wide_k[:, near].mT * scale  # [heads, end - start, near]
        scores = scores.masked_fill(segment[start:end, None] != segment[near], -torch.inf)
        blocks.append((scores.softmax(-1) @ finite[:, near]).transpose(0, 1))
    return (torch.cat(blocks) + others[segment]).to(q.dtype)
