"""PyTorch's own attention of packed sequences. What it does without a fused function is the column `vs eager`."""

from types import SimpleNamespace
from typing import Any

from polyfuse.bench.peers.base import Package, Peer, Prepared, options, places


def segment_attention(attention: Any, a: SimpleNamespace) -> Prepared:
    ends, longest = a.cu_seqlens.int(), len(a.q) if a.max_seqlen is None else a.max_seqlen
    return Prepared(lambda: attention(a.q, a.k, a.v, ends, ends, longest, longest, scale=a.scale))


PACKAGE = Package(
    ("torch",),
    (
        Peer(
            "segment_attention",
            "torch varlen_attn",
            (places("varlen_attn", "torch.nn.attention.varlen"),),
            segment_attention,
            options("segment_attention", scale=None, max_seqlen=None),
        ),
    ),
)
