"""vLLM: its quantisers, what it has around a Gated DeltaNet layer, and its position embeddings."""

import sys
from inspect import signature
from types import SimpleNamespace
from typing import Any

from polyfuse.bench.peers.base import ROUNDED_TWICE, Package, Peer, Prepared, options, places

LAYOUTS = ("row_major", "col_major", "col_major_tma")
GDN = "vllm.third_party.flash_linear_attention.ops", "vllm.model_executor.layers.fla.ops"
FP8_UTILS = "vllm.model_executor.layers.quantization.utils.fp8_utils"
MOE = "vllm.model_executor.layers.fused_moe"
CONV = "vllm.model_executor.layers.mamba.ops.causal_conv1d"
EPS = (1e-6,)  # of its norms over a head, which is no argument


def silu_mul_quant(quant: Any, a: SimpleNamespace) -> Prepared:
    import torch

    dtype = getattr(torch, a.quant_dtype)
    return Prepared(lambda: quant(a.x, a.group_size, dtype, None, a.scale_layout != "row_major"))


def silu_mul_quant_colmajor(quant: Any, a: SimpleNamespace) -> Prepared:
    return Prepared(lambda: quant(a.x, use_ue8m0=a.scale_format == "ue8m0"))


def masked_silu_mul_quant(quant: Any, a: SimpleNamespace) -> Prepared:
    return Prepared(lambda: quant(a.x, a.num_rows, group_size=a.group_size))


class _NotCuda:
    """A platform of vLLM's that says of itself that it is not CUDA."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def is_cuda(self) -> bool:
        return False


def masked_silu_mul_quant_by_triton(quant: Any, a: SimpleNamespace) -> Prepared:
    """With the Triton kernel that the function takes where it finds no CUDA, as its module alone is told here."""
    module = sys.modules[quant.__module__]
    real = module.current_platform

    def run() -> Any:
        module.current_platform = _NotCuda(real)  # type: ignore[attr-defined]
        try:
            return quant(a.x, a.num_rows, group_size=a.group_size)
        finally:
            module.current_platform = real  # type: ignore[attr-defined]

    return Prepared(run)


def group_quant(quant: Any, a: SimpleNamespace) -> Prepared:
    more = {
        "column_major_scales": a.scale_layout != "row_major",
        "tma_aligned_scales": a.scale_layout == "col_major_tma",
        "use_ue8m0": a.scale_format == "ue8m0",
    }
    return Prepared(lambda: quant(a.x, a.group_size, **more))


def rms_norm_quant(quant: Any, a: SimpleNamespace) -> Prepared:
    """The sum is written over the residual, which grows from call to call."""
    import torch

    weight, dtype = (a.weight.float() + a.weight_offset).to(a.x.dtype), getattr(torch, a.quant_dtype)
    group, transposed = [1, a.group_size], a.scale_layout != "row_major"

    def run() -> Any:
        return quant(a.x, weight, a.eps, dtype, group, None, a.residual, transposed)

    return Prepared(run, lambda found: [*found, a.x.new_empty(0, a.x.shape[1]) if a.residual is None else a.residual])


def gated_rms_norm(norm: Any, a: SimpleNamespace) -> Prepared:
    more = {"z": a.gate, "eps": a.eps, "norm_before_gate": True, "activation": a.activation}
    return Prepared(lambda: norm(a.x, a.weight, None, **more))


def post_conv(prep: Any, a: SimpleNamespace) -> Prepared:
    gates = a.a.flatten(1), a.b.flatten(1), a.A_log, a.dt_bias
    sizes = a.num_k_heads, a.head_k_dim, a.head_v_dim, a.l2norm, a.output_g_exp
    return Prepared(lambda: prep(a.conv_out, *gates, *sizes))


def conv_prep(conv: Any, prep: Any, metadata: Any, a: SimpleNamespace) -> Prepared:
    """Slot 0 of the states is nobody's: some versions take it for padding."""
    import torch

    device = a.x.device
    ends = torch.tensor([0, len(a.x)]) if a.cu_seqlens is None else a.cu_seqlens.cpu()
    count, given = len(ends) - 1, a.initial_state is not None
    states = a.x.new_zeros(count + 1, a.weight.shape[1] - 1, len(a.weight)).mT  # the channels lie beside one another
    if given:
        states[1:] = a.initial_state
    known = signature(metadata).parameters
    plan = metadata(ends.int(), device=device) if "device" in known else metadata(ends.int().to(device))
    if isinstance(plan, tuple):
        plan = SimpleNamespace(**dict(zip(("nums_dict", "batch_ptr", "token_chunk_offset_ptr"), plan, strict=True)))
    more = {
        "conv_states": states,
        "query_start_loc": ends.int().to(device),
        "cache_indices": torch.arange(1, count + 1, dtype=torch.int32, device=device),
        "has_initial_state": torch.full((count,), given, device=device),
        "activation": a.activation,
        "metadata": plan,
    }
    gates = a.a.flatten(1), a.b.flatten(1), a.A_log, a.dt_bias
    sizes = a.num_k_heads, a.head_k_dim, a.head_v_dim, a.l2norm, a.output_g_exp

    def run() -> Any:
        return prep(conv(a.x.mT, a.weight, a.bias, **more).mT, *gates, *sizes)

    return Prepared(run, lambda found: [*found, states[1:] if a.output_final_state else states[:0]])


def chunk_gated_delta_rule(rule: Any, a: SimpleNamespace) -> Prepared:
    """Its states are [V, K]."""
    arrays = dict(
        zip(("q", "k", "v", "g", "beta"), (x.unsqueeze(0) for x in (a.q, a.k, a.v, a.g, a.beta)), strict=True)
    )
    state = None if a.initial_state is None else a.initial_state.mT.contiguous()
    more = {"scale": a.scale, "initial_state": state, "output_final_state": a.output_final_state}
    none = a.g.new_empty(0, a.v.shape[1], a.k.shape[2], a.v.shape[2])

    def results(found: Any) -> list[Any]:
        o, last = found[:2]
        return [o[0], none if last is None else last.mT]

    return Prepared(lambda: rule(**arrays, **more, cu_seqlens=a.cu_seqlens), results)


def decode(conv: Any, rule: Any, norm: Any, a: SimpleNamespace) -> Prepared:
    """States are pools, updated in place: [V, K], and the last W - 1 inputs. Slot 0 is nobody's, as above.

    The conv writes over its input, so that only the first call is that of the op.
    """
    import torch

    batch, heads, value, before = len(a.x), len(a.A_log), a.head_v_dim, a.conv_weight.shape[1] - 1
    slots = torch.arange(1, batch + 1, dtype=torch.int32, device=a.x.device)
    conv_pool = a.conv_state.new_zeros(batch + 1, before, a.conv_state.shape[1]).mT
    conv_pool[1:] = a.conv_state[:batch, :, -before:]
    pool = a.recurrent_state.new_zeros(batch + 1, heads, value, a.head_k_dim)
    pool[1:] = a.recurrent_state[:batch].mT
    x, gate, scale = a.x.clone(), a.z.reshape(-1, value), a.head_k_dim**-0.5 if a.scale is None else a.scale

    def run() -> Any:
        y = conv(x, conv_pool, a.conv_weight, a.conv_bias, "silu", conv_state_indices=slots)
        o = y.new_empty(batch, 1, heads, value)
        rule(
            mixed_qkv=y,
            a=a.a,
            b=a.b,
            A_log=a.A_log,
            dt_bias=a.dt_bias,
            scale=scale,
            initial_state=pool,
            out=o,
            ssm_state_indices=slots,
            use_qk_l2norm_in_kernel=True,
        )
        flat = o.view(-1, value)
        return norm(flat, a.norm_weight, None, z=gate, eps=a.norm_eps, norm_before_gate=True).view(batch, -1)

    def results(found: Any) -> list[Any]:
        kept = a.conv_state[:batch, :, 1 : a.conv_state.shape[2] - before + 1]
        return [found, torch.cat([kept, conv_pool[1:]], -1), pool[1:].mT]

    return Prepared(run, results)


def pos_embed(interpolate: Any, a: SimpleNamespace) -> Prepared:
    """An image a launch. It takes grids on the host alone, so that one on the device is read before."""
    import torch

    grid = [[int(n) for n in image] for image in a.grid_thw]
    side = int(len(a.table) ** 0.5)

    def run() -> Any:
        rows = [interpolate(a.table, *image, side, a.merge_size, a.table.dtype) for image in grid]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    return Prepared(run)


MASKED = places(
    "persistent_masked_m_silu_mul_quant",
    f"{MOE}.experts.batched_deep_gemm_moe",
    f"{MOE}.batched_deep_gemm_moe",
)

PACKAGE = Package(
    ("vllm",),
    (
        Peer(
            "silu_mul_block_quant",
            "vllm silu_and_mul_per_block_quant",
            (places("silu_and_mul_per_block_quant", "vllm._custom_ops"),),
            silu_mul_quant,
            options(
                "silu_mul_block_quant",
                group_size=(64, 128),
                quant_dtype=("float8_e4m3fn", "int8"),
                scale_layout=("row_major", "col_major"),
            ),
        ),
        Peer(
            "silu_mul_block_quant",
            "vllm silu_mul_per_token_group_quant_fp8_colmajor",
            (places("silu_mul_per_token_group_quant_fp8_colmajor", FP8_UTILS),),
            silu_mul_quant_colmajor,
            options("silu_mul_block_quant", scale_format=("float32", "ue8m0"), scale_layout=LAYOUTS),
            tolerance={"q": ROUNDED_TWICE, "scale": 2.0**-7},
            reason="silu(gate) and the product are rounded to the dtype of x",
        ),
        Peer(
            "silu_mul_block_quant",
            "vllm persistent_masked_m_silu_mul_quant",
            (MASKED,),
            masked_silu_mul_quant,
            options("silu_mul_block_quant", scale_layout=LAYOUTS),
            needs=("num_rows",),
            tolerance={"q": ROUNDED_TWICE, "scale": 2.0**-7},
            reason="the product is one of 16-bit numbers, and q is y times a rounded 1 / scale",
        ),
        Peer(
            "silu_mul_block_quant",
            "vllm persistent_masked_m_silu_mul_quant, its Triton kernel",
            (MASKED,),
            masked_silu_mul_quant_by_triton,
            options("silu_mul_block_quant", scale_layout=LAYOUTS),
            needs=("num_rows",),
            tolerance={"q": ROUNDED_TWICE, "scale": 2.0**-7},
            reason="silu(gate) and the product are rounded to the dtype of x",
        ),
        Peer(
            "block_quant",
            "vllm per_token_group_quant_fp8",
            (places("per_token_group_quant_fp8", FP8_UTILS),),
            group_quant,
            options("block_quant", group_size=None, scale_format=("float32", "ue8m0"), scale_layout=LAYOUTS),
        ),
        Peer(
            "rms_norm_block_quant",
            "vllm rms_norm_per_block_quant",
            (places("rms_norm_per_block_quant", "vllm._custom_ops"),),
            rms_norm_quant,
            options(
                "rms_norm_block_quant",
                eps=None,
                weight_offset=None,
                group_size=(64, 128),
                quant_dtype=("float8_e4m3fn", "int8"),
                scale_layout=("row_major", "col_major"),
            ),
            takes=("residual",),
            tolerance={"q": ROUNDED_TWICE, "scale": 2.0**-6},
            reason="weight + weight_offset, the normalised row and their product are rounded to the dtype of x",
        ),
        Peer(
            "gated_rms_norm",
            "vllm rmsnorm_fn",
            (places("rmsnorm_fn", *(f"{module}.layernorm_guard" for module in GDN)),),
            gated_rms_norm,
            options("gated_rms_norm", eps=None, activation=None),
        ),
        Peer(
            "gated_delta_rule",
            "vllm chunk_gated_delta_rule",
            (places("chunk_gated_delta_rule", *(f"{module}.chunk" for module in GDN)),),
            chunk_gated_delta_rule,
            options("gated_delta_rule", scale=None, output_final_state=None),
            takes=("initial_state", "cu_seqlens"),
        ),
        Peer(
            "gdn_post_conv",
            "vllm fused_post_conv_prep",
            (places("fused_post_conv_prep", *(f"{module}.fused_gdn_prefill_post_conv" for module in GDN)),),
            post_conv,
            options("gdn_post_conv", l2norm=None, output_g_exp=None),
            tolerance={"g": 2.0**-20},
            reason="softplus is log(1 + exp(x)), which rounds 1 + exp(x)",
        ),
        Peer(
            "gdn_conv_prep",
            "vllm causal_conv1d_fn + fused_post_conv_prep",
            (
                places("causal_conv1d_fn", CONV),
                places("fused_post_conv_prep", *(f"{module}.fused_gdn_prefill_post_conv" for module in GDN)),
                places("compute_causal_conv1d_metadata", "vllm.v1.attention.backends.utils"),
            ),
            conv_prep,
            options("gdn_conv_prep", l2norm=None, output_g_exp=None, output_final_state=None, activation=None),
            takes=("bias", "initial_state", "cu_seqlens"),
            tolerance={"q": 2.0**-7, "k": 2.0**-7, "v": 2.0**-7, "g": 2.0**-20},
            reason="what the conv returns is rounded to the dtype of x, and softplus is log(1 + exp(x))",
        ),
        Peer(
            "gdn_decode",
            "vllm conv + packed_decode + rmsnorm_fn",
            (
                places("causal_conv1d_update", CONV),
                places(
                    "fused_recurrent_gated_delta_rule_packed_decode",
                    *(f"{module}.fused_recurrent" for module in GDN),
                ),
                places("rmsnorm_fn", *(f"{module}.layernorm_guard" for module in GDN)),
            ),
            decode,
            options("gdn_decode", norm_eps=None, scale=None),
            takes=("conv_bias",),
            needs=("z",),
            tolerance={"out": 2.0**-6, "recurrent_state": 2.0**-6},
            reason="what the conv and the delta rule return is rounded to the dtype of x",
        ),
        Peer(
            "pos_embed_interpolate",
            "vllm triton_pos_embed_interpolate",
            (places("triton_pos_embed_interpolate", "vllm.model_executor.models.qwen3_vl"),),
            pos_embed,
            options("pos_embed_interpolate", merge_size=None, out_rows=None),
            tolerance={"out": 2.0**-6},
            reason="the four weights, the products and the sums are rounded to the dtype of the table",
        ),
    ),
)
