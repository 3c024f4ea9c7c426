"""Functions of vLLM, each one op of polyfuse: `from polyfuse.compat.vllm import fused_post_conv_prep`."""

from collections.abc import Callable
from typing import Any, Literal

from polyfuse.spec import fail, not_installed

if missing := not_installed(__name__, "torch"):
    raise missing

import torch

import polyfuse
from polyfuse.compat._arguments import gated_norm_arguments, packed, refuse, transposed_states
from polyfuse.runtime import execute_in_parallel

__all__ = [
    "chunk_gated_delta_rule",
    "fused_post_conv_prep",
    "maybe_execute_in_parallel",
    "rmsnorm_fn",
    "silu_and_mul_per_block_quant",
    "triton_pos_embed_interpolate",
]

ACTIVATIONS: dict[str, Literal["silu", "sigmoid"]] = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}


def fused_post_conv_prep(
    conv_output: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    apply_l2norm: bool = True,
    output_g_exp: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`polyfuse.gdn_post_conv` as (q, k, v, g, beta).

    conv_output [L, 2*H*K + HV*V]; a, b [L, HV]; A_log, dt_bias [HV]. q, k [L, H, K] and v [L, HV, V] have the dtype of
    conv_output, g and beta [L, HV] are float32. The epsilon of the norm is vLLM's, 1e-6 inside the root.

    Differs: softplus is accurate to a few ulp on the whole line; vLLM's is log(1 + exp(x)) below 0, which is 0 where
    a + dt_bias is under about -16.6, and so is g. conv_output, a and b may have any strides.

    Source: vLLM, `vllm/model_executor/layers/fla/ops/fused_gdn_prefill_post_conv.py` at 41c5903, since then under
    `vllm/third_party/flash_linear_attention`.
    """
    q, k, v, g, beta = polyfuse.gdn_post_conv(
        conv_output,
        a,
        b,
        A_log,
        dt_bias,
        num_k_heads=num_k_heads,
        head_k_dim=head_k_dim,
        head_v_dim=head_v_dim,
        l2norm=apply_l2norm,
        output_g_exp=output_g_exp,
    )
    return q, k, v, g, beta


def silu_and_mul_per_block_quant(
    input: torch.Tensor,
    group_size: int,
    quant_dtype: torch.dtype,
    scale_ub: torch.Tensor | None = None,
    is_scale_transposed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`polyfuse.silu_mul_block_quant` as (q, scale).

    input [T, 2*D] = [gate | up]; q [T, D] of quant_dtype; scale [T, D / group_size] float32, with strides (1, T) if
    is_scale_transposed. The least scale is vLLM's: 1 / (qmax * 512), or the float32 epsilon for int8.

    Differs: NaN in a group makes its scale and its q NaN (int8: q 0); vLLM's maximum passes over NaN, and its clamp
    makes a finite q of it. Any group_size that divides D, float32 inputs and float8_e5m2 are allowed too. `scale_ub` is
    refused: it is a tensor, and the op takes a number.

    Source: vLLM, `vllm/_custom_ops.py` at 0002bde.
    """
    name = "silu_and_mul_per_block_quant"
    if scale_ub is not None:
        refuse(name, "scale_ub", list(scale_ub.shape), "polyfuse.silu_mul_block_quant takes it as a number")
    if input.dim() != 2:
        fail(name, "input", "[tokens, 2*hidden]", list(input.shape))
    if group_size > 0 and input.shape[1] % (2 * group_size):
        fail(name, "input", f"a last dimension divisible by 2*group_size={2 * group_size}", input.shape[1])
    q, scale = polyfuse.silu_mul_block_quant(
        input,
        group_size=group_size,
        quant_dtype=quant_dtype,
        scale_layout="col_major" if is_scale_transposed else "row_major",
    )
    return q, scale


def triton_pos_embed_interpolate(
    embed_weight: torch.Tensor,
    t: int,
    h: int,
    w: int,
    num_grid_per_side: int,
    m_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`polyfuse.pos_embed_interpolate` of one image or video, `[t*h*w, D]` in dtype and in spatial-merge order.

    embed_weight [N*N, D], N = num_grid_per_side; h and w are divisible by m_size.

    Differs: coordinates are exact integers and weights stay float32, with one rounding at the end; vLLM rounds the four
    weights to dtype and the coordinate's float32 product, which for some h picks the neighbouring cell. A tap of zero
    weight is not read, so that a NaN there does not reach the result; vLLM multiplies it. Several images in one launch:
    call the op itself.

    Source: vLLM, `vllm/model_executor/models/qwen3_vl.py`, in the releases that have a Triton kernel for it.
    """
    rows = num_grid_per_side * num_grid_per_side
    if embed_weight.dim() != 2 or embed_weight.shape[0] != rows:
        fail(
            "triton_pos_embed_interpolate",
            "embed_weight",
            f"[{rows}, D] with num_grid_per_side={num_grid_per_side}",
            list(embed_weight.shape),
        )
    return polyfuse.pos_embed_interpolate(embed_weight, [[t, h, w]], merge_size=m_size, out_dtype=dtype)


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    chunk_offsets: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    core_attn_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`polyfuse.gated_delta_rule` as (o, final_state).

    q, k [B, T, H, K], v [B, T, HV, V], g, beta [B, T, HV]; o [B, T, HV, V] in q's dtype. Each of the B rows is a
    sequence, or, with cu_seqlens [S + 1] and B=1, each stretch between two boundaries. initial_state, and the float32
    final_state (None unless output_final_state), are [S, HV, V, K], contiguous. With core_attn_out, a contiguous buffer
    of at least as many elements, o is written to its beginning and is a view of it.

    chunk_indices and chunk_offsets say how vLLM's kernels cut the sequences of cu_seqlens: the op needs no such tables.

    Differs: g of -infinity empties the state; vLLM's differences of running sums make NaN of it. float32 q, k and v are
    allowed. What core_attn_out and final_state hold is copied there. `use_qk_l2norm_in_kernel` is refused: q and k of
    `fused_post_conv_prep` are normalised.

    Source: vLLM, `vllm/third_party/flash_linear_attention/ops/chunk.py` at 81c0d5f.
    """
    name = "chunk_gated_delta_rule"
    if use_qk_l2norm_in_kernel:
        refuse(name, "use_qk_l2norm_in_kernel", True, "take q and k of fused_post_conv_prep, which normalises them")
    for argument, table in (("chunk_indices", chunk_indices), ("chunk_offsets", chunk_offsets)):
        if table is not None and cu_seqlens is None:
            fail(name, argument, "None without cu_seqlens", list(table.shape))
    if core_attn_out is not None:
        if not core_attn_out.is_contiguous() or core_attn_out.numel() < v.numel():
            want = f"a contiguous buffer of at least {v.numel()} elements"
            fail(name, "core_attn_out", want, [list(core_attn_out.shape), list(core_attn_out.stride())])
        if core_attn_out.dtype != q.dtype:
            fail(name, "core_attn_out", f"the dtype of q, {q.dtype}", core_attn_out.dtype)
    flat, boundaries = packed(name, q, k, v, g, beta, cu_seqlens)
    states = transposed_states(name, initial_state, q, v)
    rows, state = polyfuse.gated_delta_rule(
        *flat,
        initial_state=None if states is None else states.float(),
        cu_seqlens=boundaries,
        scale=scale,
        output_final_state=output_final_state,
    )
    o = rows.view(v.shape)
    if core_attn_out is not None:
        o = core_attn_out.view(-1)[: v.numel()].view(v.shape).copy_(o)
    return o, state.mT.contiguous() if output_final_state else None


def rmsnorm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    activation: str = "swish",
) -> torch.Tensor:
    """`polyfuse.gated_rms_norm`: x / sqrt(mean(x^2) + eps) * weight * act(z), in x's dtype.

    x, z [..., V]; weight [V]; activation swish, silu or sigmoid.

    Differs: nothing in the values but the last bits of float32. `bias`, a missing z, a group_size that is not V, and
    norm_before_gate=False are refused.

    Source: vLLM, `vllm/third_party/flash_linear_attention/ops/layernorm_guard.py` at 263eecf.
    """
    gate = gated_norm_arguments("rmsnorm_fn", x, bias, z, group_size, norm_before_gate)
    if activation not in ACTIVATIONS:
        fail("rmsnorm_fn", "activation", " or ".join(ACTIVATIONS), activation)
    return polyfuse.gated_rms_norm(x, gate, weight, eps=eps, activation=ACTIVATIONS[activation])


def maybe_execute_in_parallel(
    fn0: Callable[[], Any],
    fn1: Callable[[], Any],
    event0: torch.cuda.Event,
    event1: torch.cuda.Event,
    aux_stream: torch.cuda.Stream | None = None,
) -> tuple[Any, Any]:
    """`polyfuse.runtime.execute_in_parallel` of two functions if there is an aux_stream, else one after the other.

    Differs: fn1 runs on a stream that polyfuse keeps for the device of aux_stream, so that the two events are neither
    recorded nor waited for, and a priority of aux_stream has no effect. Results of fn1 are kept from reuse until the
    current stream is past them, an exception leaves the streams joined, and both functions are called even if one
    raises. Inside the capture of a graph the fork is captured. POLYFUSE_STREAMS=0 runs both in order.

    Source: vLLM, `vllm/utils/multi_stream_utils.py` at 0507815.
    """
    if aux_stream is None:
        return fn0(), fn1()
    first, second = execute_in_parallel(fn0, fn1, device=aux_stream.device)
    return first, second
