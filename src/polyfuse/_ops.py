"""The public functions: one per op, with the op's parameters and `backend=`.

Their documentation is their spec. This module is imported at the first use of an op.
"""

from collections.abc import Sequence
from typing import Any

from polyfuse.dispatch import declared, public, run


@public
def pos_embed_interpolate(
    table: Any,
    grid_thw: Any,
    *,
    merge_size: int = 2,
    mode: str = "bilinear",
    align_corners: bool = True,
    base: Any = None,
    out_dtype: Any = None,
    out_rows: int | None = None,
    backend: str | Sequence[str] | None = None,
) -> Any:
    args = (table, grid_thw, merge_size, mode, align_corners, base, out_dtype, out_rows)
    return run("pos_embed_interpolate", args, backend)


@public
def gdn_post_conv(
    conv_out: Any,
    a: Any,
    b: Any,
    A_log: Any,
    dt_bias: Any,
    *,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool = True,
    l2norm_eps: float = 1e-6,
    output_g_exp: bool = False,
    backend: str | Sequence[str] | None = None,
) -> Any:
    args = (conv_out, a, b, A_log, dt_bias, num_k_heads, head_k_dim, head_v_dim, l2norm, l2norm_eps, output_g_exp)
    return run("gdn_post_conv", args, backend)


@public
def gdn_conv_prep(
    x: Any,
    weight: Any,
    a: Any,
    b: Any,
    A_log: Any,
    dt_bias: Any,
    *,
    bias: Any = None,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool = True,
    l2norm_eps: float = 1e-6,
    output_g_exp: bool = False,
    output_final_state: bool = False,
    backend: str | Sequence[str] | None = None,
) -> Any:
    tensors = (x, weight, a, b, A_log, dt_bias, bias, initial_state, cu_seqlens)
    heads = (num_k_heads, head_k_dim, head_v_dim)
    return run("gdn_conv_prep", (*tensors, *heads, l2norm, l2norm_eps, output_g_exp, output_final_state), backend)


@public
def silu_mul_block_quant(
    x: Any,
    *,
    num_rows: Any = None,
    group_size: int = 128,
    quant_dtype: Any = "float8_e4m3fn",
    scale_format: str = "float32",
    scale_layout: str = "row_major",
    scale_ub: float | None = None,
    scale_min: float | None = None,
    limit: float | None = None,
    materialize: bool = False,
    reciprocal: bool = False,
    backend: str | Sequence[str] | None = None,
) -> Any:
    scaling = (scale_format, scale_layout, scale_ub, scale_min)
    args = (x, num_rows, group_size, quant_dtype, *scaling, limit, materialize, reciprocal)
    return run("silu_mul_block_quant", args, backend)


@public
def gdn_in_proj(
    x: Any,
    w_qkvz: Any,
    w_ba: Any,
    *,
    bias_qkvz: Any = None,
    bias_ba: Any = None,
    strategy: str = "auto",
    backend: str | Sequence[str] | None = None,
) -> Any:
    return run("gdn_in_proj", (x, w_qkvz, w_ba, bias_qkvz, bias_ba, strategy), backend)


@public
def segment_attention(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens: Any,
    *,
    scale: float | None = None,
    max_seqlen: int | None = None,
    backend: str | Sequence[str] | None = None,
) -> Any:
    return run("segment_attention", (q, k, v, cu_seqlens, scale, max_seqlen), backend)


TABLE = declared()
