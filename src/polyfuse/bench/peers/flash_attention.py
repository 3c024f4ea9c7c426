"""FlashAttention, by its function for packed sequences."""

from types import SimpleNamespace
from typing import Any

from polyfuse.bench.peers.base import Package, Peer, Prepared, options, places


def segment_attention(attention: Any, a: SimpleNamespace) -> Prepared:
    ends, longest = a.cu_seqlens.int(), len(a.q) if a.max_seqlen is None else a.max_seqlen
    return Prepared(lambda: attention(a.q, a.k, a.v, ends, ends, longest, longest, softmax_scale=a.scale))


PACKAGE = Package(
    ("flash-attn", "flash_attn_3"),
    (
        Peer(
            "segment_attention",
            "flash_attn_varlen_func",
            (places("flash_attn_varlen_func", "flash_attn_interface", "flash_attn"),),
            segment_attention,
            options("segment_attention", scale=None, max_seqlen=None),
        ),
    ),
)
