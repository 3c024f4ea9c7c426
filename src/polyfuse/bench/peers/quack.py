"""quack-kernels. Its RMS norm has no gate and no quantiser behind it, and its quantisers stand behind a GEMM."""

from polyfuse.bench.peers.base import Package

PACKAGE = Package(("quack-kernels",), note="no function of it computes one of the ops: its RMS norm has no gate")
