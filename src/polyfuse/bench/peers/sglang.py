"""SGLang, and its kernels as a package of their own."""

from types import SimpleNamespace
from typing import Any

from polyfuse.bench.peers.base import ROUNDED_TWICE, Package, Peer, Prepared, options, places

LEAST_AMAX = 1e-10  # what its kernels raise the maximum of a group to
Q_STEPS = {"q": ROUNDED_TWICE, "scale": 2.0**-7}


def masked_silu_mul_quant(quant: Any, a: SimpleNamespace) -> Prepared:
    import torch

    experts, rows, width = a.x.shape

    def run() -> Any:
        q = torch.empty(experts, rows, width // 2, dtype=torch.float8_e4m3fn, device=a.x.device)
        scale = torch.empty(experts, rows, width // 2 // a.group_size, dtype=torch.float32, device=a.x.device)
        quant(a.x, q, scale, a.group_size, a.num_rows, scale_ue8m0=a.scale_format == "ue8m0")
        return q, scale

    return Prepared(run)


def per_token_group_quant(quant: Any, a: SimpleNamespace) -> Prepared:
    more = {
        "column_major_scales": a.scale_layout != "row_major",
        "scale_tma_aligned": a.scale_layout == "col_major_tma",
    }
    return Prepared(lambda: quant(a.x, a.group_size, LEAST_AMAX, **more))


def kernel_group_quant(quant: Any, a: SimpleNamespace) -> Prepared:
    import torch

    largest = torch.finfo(torch.float8_e4m3fn).max

    def run() -> Any:
        q = torch.empty_like(a.x, dtype=torch.float8_e4m3fn)
        scale = a.x.new_empty((*a.x.shape[:-1], a.x.shape[-1] // a.group_size), dtype=torch.float32)
        quant(a.x, q, scale, a.group_size, LEAST_AMAX, -largest, largest)
        return q, scale

    return Prepared(run)


PACKAGE = Package(
    ("sglang",),
    (
        Peer(
            "silu_mul_block_quant",
            "sglang silu_and_mul_masked_post_quant",
            (
                places(
                    "silu_and_mul_masked_post_quant_fwd",
                    "sglang.kernels.ops.moe.ep_moe_kernels",
                    "sglang.srt.layers.moe.ep_moe.kernels",
                ),
            ),
            masked_silu_mul_quant,
            options(
                "silu_mul_block_quant",
                group_size=None,
                scale_format=("float32", "ue8m0"),
                scale_layout=("row_major",),
                materialize=None,
            ),
            needs=("num_rows",),
            tolerance=Q_STEPS,
            reason="silu(gate) and the product are rounded to the dtype of x",
        ),
        Peer(
            "block_quant",
            "sglang per_token_group_quant_fp8",
            (
                places(
                    "sglang_per_token_group_quant_fp8",
                    "sglang.kernels.ops.quantization.fp8_kernel",
                    "sglang.srt.layers.quantization.fp8_kernel",
                ),
            ),
            per_token_group_quant,
            options("block_quant", group_size=None, scale_layout=("row_major", "col_major", "col_major_tma")),
            tolerance={"q": ROUNDED_TWICE},
            reason="q is y * (1 / scale), with a rounded 1 / scale",
        ),
    ),
)
KERNELS = Package(
    ("sgl-kernel", "sglang-kernel"),
    (
        Peer(
            "block_quant",
            "sgl_per_token_group_quant_8bit",
            (places("sgl_per_token_group_quant_8bit", "sgl_kernel", "sgl_kernel.gemm"),),
            kernel_group_quant,
            options("block_quant", group_size=(16, 32, 64, 128)),
            tolerance={"q": ROUNDED_TWICE},
            reason="q is y * (1 / scale), with a rounded 1 / scale",
        ),
    ),
)
