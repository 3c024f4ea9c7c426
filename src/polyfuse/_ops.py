"""The public functions, one per op. `make generate` writes this file from the specs: change them, not it.

Each function's documentation is its spec. This module is imported at the first use of an op.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

from polyfuse.dispatch import named, public, run

if TYPE_CHECKING:
    import jax
    import numpy
    import torch

    Array = TypeVar("Array", torch.Tensor, jax.Array, numpy.ndarray[Any, Any])
    HostArray = numpy.ndarray[Any, Any]
    DType = str | torch.dtype | numpy.dtype[Any] | type[Any]
else:
    Array = TypeVar("Array")
    HostArray = DType = Any

__all__ = [
    "BlockQuantResult",
    "GatedDeltaRuleResult",
    "GdnConvPrepResult",
    "GdnInProjResult",
    "GdnPostConvResult",
    "RmsNormBlockQuantResult",
    "SiluMulBlockQuantResult",
    "block_quant",
    "gated_delta_rule",
    "gated_rms_norm",
    "gdn_conv_prep",
    "gdn_decode",
    "gdn_in_proj",
    "gdn_post_conv",
    "pos_embed_interpolate",
    "rms_norm_block_quant",
    "segment_attention",
    "silu_mul_block_quant",
]


@public
def pos_embed_interpolate(
    table: Array,
    grid_thw: Sequence[Sequence[int]] | Array | HostArray,
    *,
    base: Array | None = None,
    merge_size: int = 2,
    mode: Literal["bilinear", "bicubic"] = "bilinear",
    align_corners: bool = True,
    out_dtype: DType | None = None,
    out_rows: int | None = None,
    table_height: int | None = None,
    backend: str | Sequence[str] | None = None,
) -> Array:
    """Resample a learned position-embedding table to every image's patch grid."""
    return run(
        "pos_embed_interpolate",
        (table, grid_thw, base, merge_size, mode, align_corners, out_dtype, out_rows, table_height),
        backend,
    )


class GdnPostConvResult(NamedTuple, Generic[Array]):
    """The results of `gdn_post_conv`."""

    q: Array
    k: Array
    v: Array
    g: Array
    beta: Array


@public
def gdn_post_conv(
    conv_out: Array,
    a: Array,
    b: Array,
    A_log: Array,
    dt_bias: Array,
    *,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool = True,
    l2norm_eps: float = 1e-06,
    output_g_exp: bool = False,
    backend: str | Sequence[str] | None = None,
) -> GdnPostConvResult[Array]:
    """Split, L2-normalise and gate a Gated DeltaNet layer's conv output into q, k, v, g, beta, in one pass."""
    return named(
        GdnPostConvResult,
        run(
            "gdn_post_conv",
            (conv_out, a, b, A_log, dt_bias, num_k_heads, head_k_dim, head_v_dim, l2norm, l2norm_eps, output_g_exp),
            backend,
        ),
    )


class GdnConvPrepResult(NamedTuple, Generic[Array]):
    """The results of `gdn_conv_prep`."""

    q: Array
    k: Array
    v: Array
    g: Array
    beta: Array
    final_state: Array


@public
def gdn_conv_prep(
    x: Array,
    weight: Array,
    a: Array,
    b: Array,
    A_log: Array,
    dt_bias: Array,
    *,
    bias: Array | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    state_pool: Array | None = None,
    state_indices: Array | None = None,
    has_initial_state: Array | None = None,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool = True,
    l2norm_eps: float = 1e-06,
    output_g_exp: bool = False,
    output_final_state: bool = False,
    interleaved: bool = False,
    activation: Literal["silu"] | None = "silu",
    backend: str | Sequence[str] | None = None,
) -> GdnConvPrepResult[Array]:
    """Causal conv, SiLU, split, L2-normalisation and gates of a Gated DeltaNet layer, in one pass."""
    return named(
        GdnConvPrepResult,
        run(
            "gdn_conv_prep",
            (
                x,
                weight,
                a,
                b,
                A_log,
                dt_bias,
                bias,
                initial_state,
                cu_seqlens,
                state_pool,
                state_indices,
                has_initial_state,
                num_k_heads,
                head_k_dim,
                head_v_dim,
                l2norm,
                l2norm_eps,
                output_g_exp,
                output_final_state,
                interleaved,
                activation,
            ),
            backend,
        ),
    )


class SiluMulBlockQuantResult(NamedTuple, Generic[Array]):
    """The results of `silu_mul_block_quant`."""

    q: Array
    scale: Array


@public
def silu_mul_block_quant(
    x: Array,
    *,
    up: Array | None = None,
    row_weight: Array | None = None,
    num_rows: Array | None = None,
    expert_ends: Array | None = None,
    global_scale: Array | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    limit: float | None = None,
    limit_on: Literal["input", "silu"] = "input",
    materialize: bool = False,
    group_size: int = 128,
    quant_dtype: DType = "float8_e4m3fn",
    scale_format: Literal["float32", "ue8m0", "ue8m0_packed", "e4m3"] = "float32",
    scale_layout: Literal["row_major", "col_major", "col_major_tma", "swizzled_128x4"] = "row_major",
    scale_ub: float | None = None,
    scale_min: float | None = None,
    reciprocal: bool = False,
    expert_alignment: int = 1,
    fill: float | None = None,
    backend: str | Sequence[str] | None = None,
) -> SiluMulBlockQuantResult[Array]:
    """SiLU-and-multiply followed by block-wise FP8, FP4 or INT8 quantisation, in one pass over the activation."""
    return named(
        SiluMulBlockQuantResult,
        run(
            "silu_mul_block_quant",
            (
                x,
                up,
                row_weight,
                num_rows,
                expert_ends,
                global_scale,
                interleaved,
                alpha,
                up_offset,
                limit,
                limit_on,
                materialize,
                group_size,
                quant_dtype,
                scale_format,
                scale_layout,
                scale_ub,
                scale_min,
                reciprocal,
                expert_alignment,
                fill,
            ),
            backend,
        ),
    )


class BlockQuantResult(NamedTuple, Generic[Array]):
    """The results of `block_quant`."""

    q: Array
    scale: Array


@public
def block_quant(
    x: Array,
    *,
    num_rows: Array | None = None,
    expert_ends: Array | None = None,
    global_scale: Array | None = None,
    group_size: int = 128,
    quant_dtype: DType = "float8_e4m3fn",
    scale_format: Literal["float32", "ue8m0", "ue8m0_packed", "e4m3"] = "float32",
    scale_layout: Literal["row_major", "col_major", "col_major_tma", "swizzled_128x4"] = "row_major",
    scale_ub: float | None = None,
    scale_min: float | None = None,
    reciprocal: bool = False,
    expert_alignment: int = 1,
    fill: float | None = None,
    backend: str | Sequence[str] | None = None,
) -> BlockQuantResult[Array]:
    """Block-wise FP8, FP4 or INT8 quantisation of any activation, in one pass."""
    return named(
        BlockQuantResult,
        run(
            "block_quant",
            (
                x,
                num_rows,
                expert_ends,
                global_scale,
                group_size,
                quant_dtype,
                scale_format,
                scale_layout,
                scale_ub,
                scale_min,
                reciprocal,
                expert_alignment,
                fill,
            ),
            backend,
        ),
    )


class RmsNormBlockQuantResult(NamedTuple, Generic[Array]):
    """The results of `rms_norm_block_quant`."""

    q: Array
    scale: Array
    sum: Array


@public
def rms_norm_block_quant(
    x: Array,
    weight: Array,
    *,
    residual: Array | None = None,
    num_rows: Array | None = None,
    expert_ends: Array | None = None,
    global_scale: Array | None = None,
    eps: float = 1e-06,
    weight_offset: float = 0.0,
    group_size: int = 128,
    quant_dtype: DType = "float8_e4m3fn",
    scale_format: Literal["float32", "ue8m0", "ue8m0_packed", "e4m3"] = "float32",
    scale_layout: Literal["row_major", "col_major", "col_major_tma", "swizzled_128x4"] = "row_major",
    scale_ub: float | None = None,
    scale_min: float | None = None,
    reciprocal: bool = False,
    expert_alignment: int = 1,
    fill: float | None = None,
    backend: str | Sequence[str] | None = None,
) -> RmsNormBlockQuantResult[Array]:
    """Residual sum and root-mean-square normalisation followed by block-wise quantisation, in one pass."""
    return named(
        RmsNormBlockQuantResult,
        run(
            "rms_norm_block_quant",
            (
                x,
                weight,
                residual,
                num_rows,
                expert_ends,
                global_scale,
                eps,
                weight_offset,
                group_size,
                quant_dtype,
                scale_format,
                scale_layout,
                scale_ub,
                scale_min,
                reciprocal,
                expert_alignment,
                fill,
            ),
            backend,
        ),
    )


class GdnInProjResult(NamedTuple, Generic[Array]):
    """The results of `gdn_in_proj`."""

    qkvz: Array
    ba: Array


@public
def gdn_in_proj(
    x: Array,
    w_qkvz: Array,
    w_ba: Array,
    *,
    w_z: Array | None = None,
    w_a: Array | None = None,
    bias_qkvz: Array | None = None,
    bias_ba: Array | None = None,
    strategy: Literal["auto", "sequential", "parallel", "merged", "fused"] = "auto",
    backend: str | Sequence[str] | None = None,
) -> GdnInProjResult[Array]:
    """Two input projections of one activation, run one after the other, side by side, or as one."""
    return named(
        GdnInProjResult, run("gdn_in_proj", (x, w_qkvz, w_ba, w_z, w_a, bias_qkvz, bias_ba, strategy), backend)
    )


@public
def segment_attention(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens: Array,
    *,
    scale: float | None = None,
    max_seqlen: int | None = None,
    backend: str | Sequence[str] | None = None,
) -> Array:
    """Softmax attention of every row of a packed batch over its own segment."""
    return run("segment_attention", (q, k, v, cu_seqlens, scale, max_seqlen), backend)


@public
def gated_rms_norm(
    x: Array,
    gate: Array,
    weight: Array,
    *,
    eps: float = 1e-06,
    activation: Literal["silu", "sigmoid"] = "silu",
    weight_offset: float = 0.0,
    backend: str | Sequence[str] | None = None,
) -> Array:
    """Root-mean-square normalisation of each row, times a weight and an activated gate, in one pass."""
    return run("gated_rms_norm", (x, gate, weight, eps, activation, weight_offset), backend)


class GatedDeltaRuleResult(NamedTuple, Generic[Array]):
    """The results of `gated_delta_rule`."""

    o: Array
    final_state: Array


@public
def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    *,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    state_pool: Array | None = None,
    state_indices: Array | None = None,
    has_initial_state: Array | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
    backend: str | Sequence[str] | None = None,
) -> GatedDeltaRuleResult[Array]:
    """The gated delta rule over the rows of packed sequences, with their states."""
    return named(
        GatedDeltaRuleResult,
        run(
            "gated_delta_rule",
            (
                q,
                k,
                v,
                g,
                beta,
                initial_state,
                cu_seqlens,
                state_pool,
                state_indices,
                has_initial_state,
                scale,
                output_final_state,
            ),
            backend,
        ),
    )


@public
def gdn_decode(
    x: Array,
    z: Array | None,
    a: Array,
    b: Array,
    conv_weight: Array,
    A_log: Array,
    dt_bias: Array,
    norm_weight: Array,
    conv_state: Array,
    recurrent_state: Array,
    *,
    conv_bias: Array | None = None,
    state_indices: Array | None = None,
    num_accepted: Array | None = None,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    interleaved: bool = False,
    l2norm_eps: float = 1e-06,
    norm_eps: float = 1e-06,
    scale: float | None = None,
    backend: str | Sequence[str] | None = None,
) -> Array:
    """One step of generation of a Gated DeltaNet layer between its two projections, with its states in place."""
    return run(
        "gdn_decode",
        (
            x,
            z,
            a,
            b,
            conv_weight,
            A_log,
            dt_bias,
            norm_weight,
            conv_state,
            recurrent_state,
            conv_bias,
            state_indices,
            num_accepted,
            num_k_heads,
            head_k_dim,
            head_v_dim,
            interleaved,
            l2norm_eps,
            norm_eps,
            scale,
        ),
        backend,
    )
