"""What other packages have for an op, to be timed beside ours: `polyfuse bench --peers`.

A module for each package states its peers: the op, the options of it that the peer has, and how it is called. None of
these packages is imported before one of its peers is asked for.
"""

from polyfuse.bench.peers import fla, flash_attention, liger, quack, sglang, torch, vllm
from polyfuse.bench.peers.base import Package, Peer, Prepared

__all__ = ["PACKAGES", "Package", "Peer", "Prepared"]

PACKAGES: tuple[Package, ...] = (
    fla.PACKAGE,
    vllm.PACKAGE,
    sglang.PACKAGE,
    sglang.KERNELS,
    liger.PACKAGE,
    quack.PACKAGE,
    flash_attention.PACKAGE,
    torch.PACKAGE,
)
