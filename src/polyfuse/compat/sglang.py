"""Functions of SGLang, each one op of polyfuse: `from polyfuse.compat.sglang import chunk_gated_delta_rule`."""

from polyfuse.spec import fail, not_installed

if missing := not_installed(__name__, "torch"):
    raise missing

import torch

import polyfuse
from polyfuse.compat._arguments import packed, refuse, transposed_states

__all__ = ["chunk_gated_delta_rule", "silu_and_mul_masked_post_quant_fwd"]

LEAST_AMAX = 1e-10  # what SGLang's kernel raises the maximum of a group to


def silu_and_mul_masked_post_quant_fwd(
    input: torch.Tensor,
    output: torch.Tensor,
    output_scale: torch.Tensor,
    quant_group_size: int,
    masked_m: torch.Tensor,
    scale_ue8m0: bool = False,
    gemm1_alpha: float = 0.0,
    gemm1_clamp_limit: float = 0.0,
) -> None:
    """`polyfuse.silu_mul_block_quant` with materialize, into output and output_scale.

    input [E, T, 2*D] = [gate | up]; output [E, T, D] float8_e4m3fn, contiguous; output_scale [E, T, D / group] float32
    of any strides; masked_m [E], valid rows per expert. Rows past masked_m keep what they hold. silu(gate) and the
    product are rounded to input's dtype, as SGLang does, and the least maximum of a group is SGLang's 1e-10. With
    scale_ue8m0 scales are rounded up to powers of two.

    Differs: NaN in a group makes its scale and its q NaN; SGLang's maximum passes over NaN. q is y / scale with one
    rounding; SGLang multiplies by a rounded 1 / scale. Powers of two are exact; SGLang's log2 may miss one. The results
    are copied into output and output_scale, which is one more pass over them. `gemm1_alpha` and `gemm1_clamp_limit` are
    refused.

    Source: SGLang, `python/sglang/kernels/ops/moe/ep_moe_kernels.py` at 0134da0.
    """
    name = "silu_and_mul_masked_post_quant_fwd"
    for argument, value in (("gemm1_alpha", gemm1_alpha), ("gemm1_clamp_limit", gemm1_clamp_limit)):
        if value:
            refuse(name, argument, value, "polyfuse.silu_mul_block_quant has alpha, up_offset and limit")
    if input.dim() != 3:
        fail(name, "input", "[experts, tokens, 2*hidden]", list(input.shape))
    experts, tokens, width = input.shape
    if quant_group_size < 1 or width % (2 * quant_group_size):
        fail(name, "input", f"a last dimension divisible by 2*quant_group_size={2 * quant_group_size}", width)
    _check(name, "output", output, [experts, tokens, width // 2], torch.float8_e4m3fn)
    if not output.is_contiguous():
        fail(name, "output", "a contiguous tensor", list(output.stride()))
    _check(name, "output_scale", output_scale, [experts, tokens, width // 2 // quant_group_size], torch.float32)
    if list(masked_m.shape) != [experts] or masked_m.dtype not in (torch.int32, torch.int64):
        fail(name, "masked_m", f"[{experts}] of int32 or int64", [list(masked_m.shape), masked_m.dtype])
    q, scale = polyfuse.silu_mul_block_quant(
        input,
        num_rows=masked_m.int(),
        group_size=quant_group_size,
        scale_format="ue8m0" if scale_ue8m0 else "float32",
        scale_min=LEAST_AMAX / torch.finfo(torch.float8_e4m3fn).max,
        materialize=True,
    )
    valid = (torch.arange(tokens, device=masked_m.device) < masked_m[:, None])[..., None]
    stored = output.view(torch.uint8)
    stored.copy_(torch.where(valid, q.view(torch.uint8), stored))
    output_scale.copy_(torch.where(valid, scale, output_scale))


def _check(function: str, argument: str, array: torch.Tensor, shape: list[int], dtype: torch.dtype) -> None:
    if list(array.shape) != shape or array.dtype != dtype:
        fail(function, argument, f"{shape} of {dtype}", [list(array.shape), array.dtype])


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_first: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    inplace_update: bool = True,
) -> tuple[torch.Tensor, None, None]:
    """`polyfuse.gated_delta_rule` with a pool of states, as (o, None, None).

    q, k [B, T, H, K], v [B, T, HV, V], g, beta [B, T, HV]; o [B, T, HV, V] in q's dtype. Each of the B rows is a
    sequence, or, with cu_seqlens [S + 1] and B=1, each stretch between two boundaries. initial_state [slots, HV, V, K]
    is the pool, of any strides and float dtype: sequence i begins with slot initial_state_indices[i], or slot i without
    indices, and leaves its last state there. Without initial_state sequences begin with zeros.

    Differs: SGLang's third result, the state before each chunk, is None. g of -infinity empties the state; SGLang's
    differences of running sums make NaN of it. An index of -1 is no slot: the sequence begins with zeros, and its last
    state is written nowhere. float32 q, k and v are allowed. `use_qk_l2norm_in_kernel`, `head_first` and
    inplace_update=False are refused.

    Source: SGLang, `python/sglang/kernels/ops/attention/fla/chunk.py` at 0a0df25.
    """
    name = "chunk_gated_delta_rule"
    if use_qk_l2norm_in_kernel:
        refuse(name, "use_qk_l2norm_in_kernel", True, "take q and k of polyfuse.gdn_conv_prep, which normalises them")
    if head_first:
        refuse(name, "head_first", True, "transpose to [B, T, H, ...]")
    if not inplace_update:
        refuse(name, "inplace_update", False, "give a copy of the slots")
    if initial_state is None and initial_state_indices is not None:
        fail(name, "initial_state_indices", "None without initial_state", list(initial_state_indices.shape))
    flat, boundaries = packed(name, q, k, v, g, beta, cu_seqlens)
    pool = transposed_states(name, initial_state, q, v)
    o, _ = polyfuse.gated_delta_rule(
        *flat,
        cu_seqlens=boundaries,
        state_pool=pool,
        state_indices=initial_state_indices,
        scale=scale,
    )
    return o.view(v.shape), None, None
