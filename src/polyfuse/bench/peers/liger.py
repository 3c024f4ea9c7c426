"""Liger kernels. A norm and a SiLU with its product are what it has of our ops, in two launches."""

from types import SimpleNamespace
from typing import Any

from polyfuse.bench.peers.base import Package, Peer, Prepared, options, places


def gated_rms_norm(norm: Any, silu_mul: Any, a: SimpleNamespace) -> Prepared:
    def run() -> Any:
        return silu_mul(a.gate, norm(a.x, a.weight, a.eps, a.weight_offset, "gemma", False))

    return Prepared(run)


PACKAGE = Package(
    ("liger_kernel",),
    (
        Peer(
            "gated_rms_norm",
            "liger rms_norm + silu_mul",
            (
                places("liger_rms_norm", "liger_kernel.transformers.functional"),
                places("liger_swiglu", "liger_kernel.transformers.functional"),
            ),
            gated_rms_norm,
            options("gated_rms_norm", eps=None, weight_offset=None),
            tolerance={"y": 2.0**-6},
            reason="the norm and the SiLU are rounded to the dtype of x",
        ),
    ),
)
