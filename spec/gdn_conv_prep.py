"""`gdn_conv_prep`: a Gated DeltaNet layer from its projection to its delta rule, in one pass.

A row of `x` is [q | k | v] as the projection wrote it, with H heads of K for q and for k, and HV heads of V for v. A
causal depthwise convolution of width W over the rows of each sequence, a SiLU, then all of `gdn_post_conv`:

    c[t]   bias + sum over j < W of weight[:, j] * x[t - (W - 1) + j]
    y      c * sigmoid(c)
    q, k   y / sqrt(sum(y * y) + eps)        over the head; y itself with l2norm=False
    v      y
    g      -exp(A_log) * softplus(a + dt_bias)        exp of that with output_g_exp=True
    beta   sigmoid(b)

`cu_seqlens` [S + 1] packs S sequences: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1], and may be empty. Without
it all rows are one sequence. What lies before a sequence's first row comes from `initial_state` [S, C, W - 1], its last
W - 1 inputs, oldest first, and is zero without one; never from another sequence. `final_state` is the same after the
sequence's last row: the initial state of the call that goes on, also where the sequence has fewer than W - 1 rows.
With `interleaved` x is Qwen3-Next's whole first projection, read in place: H key heads of [q K | k K | v G*V | z G*V],
where G = HV / H, so that value head j belongs to key head j // G. The columns of z are not read. Channels of `weight`,
`bias` and the states stay [q | k | v], each with its heads in order, and the results are the same.
All arithmetic is fp32 or wider with one rounding per output: c and y are not rounded. g and beta are float32.
"""

from collections.abc import Mapping
from typing import Any

from polyfuse.spec._types import FLOATS, INTS, AttrSpec, Call, Cost, ErrorBound, OpSpec, OutputSpec, TensorSpec
from polyfuse.spec._validate import fail, itemsize
from polyfuse.spec.gdn_post_conv import (
    BETA_REASON,
    BETA_STEPS,
    GATE_REASON,
    GATE_STEPS,
    NORM_REASON,
    norm_flushes,
    norm_steps,
)
from polyfuse.spec.gdn_post_conv import SPEC as POST_CONV

NAME = "gdn_conv_prep"

MAX_WIDTH = 4

SILU_SLOPE = 1.1  # the largest derivative of SiLU is 1.0998

_CHANNELS = "2*num_k_heads*head_k_dim + HV*head_v_dim"
_COLUMNS = "2*num_k_heads*head_k_dim + (1 + interleaved)*HV*head_v_dim"


def _check(call: Call) -> None:
    POST_CONV.check(call)
    heads, heads_v = call.attrs["num_k_heads"], call.dims["HV"]
    if call.attrs["interleaved"] and heads_v % heads:
        fail(NAME, "A_log", f"HV divisible by num_k_heads={heads} with interleaved=True", heads_v)
    if not 2 <= call.dims["W"] <= MAX_WIDTH:
        fail(NAME, "weight", f"a width of 2 to {MAX_WIDTH} in [{_CHANNELS}, W]", call.dims["W"])
    if call.dims.get("N", 2) < 2:
        fail(NAME, "cu_seqlens", "at least 2 elements", call.dims["N"])


def _derive(call: Call) -> Mapping[str, Any]:
    sequences = call.dims["N"] - 1 if "cu_seqlens" in call.dtypes else 1
    channels, before = _channels(call), call.dims["W"] - 1
    return {
        "S": sequences,
        "F": sequences if call.attrs["output_final_state"] else 0,
        "final_strides": (channels * before, 1, channels),
    }


def _channels(call: Call) -> Any:
    return 2 * call.attrs["num_k_heads"] * call.attrs["head_k_dim"] + call.dims["HV"] * call.attrs["head_v_dim"]


def _cost(call: Call) -> Cost:
    d, post = call.dims, POST_CONV.cost(call)
    size = itemsize(call.dtypes["T"])
    channels = _channels(call)
    state = channels * (d["W"] - 1) * size
    read = channels * d["W"] * itemsize(call.dtypes["weight"])
    if "initial_state" in call.dtypes:
        read += d["S"] * state
    flops = d["L"] * channels * (2 * d["W"] + 6)
    return Cost(post.bytes_read + read, post.bytes_written + d["F"] * state, post.flops + flops)


SPEC = OpSpec(
    name=NAME,
    version=2,
    summary="Causal conv, SiLU, split, L2-normalisation and gates of a Gated DeltaNet layer, in one pass.",
    formula=__doc__ or "",
    source=(
        "Yang, Kautz, Hatamizadeh, Gated Delta Networks, arXiv:2412.06464; Gu, Dao, Mamba, arXiv:2312.00752, for the "
        "conv; Transformers Qwen3NextGatedDeltaNet; Qwen3.5"
    ),
    rows="L",
    tensors=(
        TensorSpec(
            "x",
            ("L", _COLUMNS),
            FLOATS,
            "[q | k | v] before the conv, or key heads of [q | k | v | z] with interleaved; any strides",
            dtype_var="T",
        ),
        TensorSpec("weight", (_CHANNELS, "W"), FLOATS, "of the conv; W is 2 to 4, the last column the row itself"),
        *POST_CONV.tensors[1:],
        TensorSpec("bias", (_CHANNELS,), FLOATS, "of the conv", optional=True),
        TensorSpec(
            "initial_state",
            ("S", _CHANNELS, "W - 1"),
            FLOATS,
            "the inputs before each sequence, oldest first",
            dtype_var="T",
            optional=True,
        ),
        TensorSpec(
            "cu_seqlens", ("N",), INTS, "where each of the S = N - 1 sequences begins, and the end", optional=True
        ),
    ),
    attrs=(
        *POST_CONV.attrs,
        AttrSpec("output_final_state", "bool", False, "return final_state; else it has no sequences"),
        AttrSpec("interleaved", "bool", False, "x is Qwen3-Next's projection: key heads of [q | k | v | z]"),
    ),
    outputs=(
        *POST_CONV.outputs,
        OutputSpec(
            "final_state",
            ("F", _CHANNELS, "W - 1"),
            "T",
            "the last inputs of each sequence, oldest first; rows [F, W - 1, C] in memory",
            strides="final_strides",
        ),
    ),
    errors=(
        ErrorBound(
            "c",
            6,
            "magnitude |bias| + sum |weight * x|: at most 4 products and 4 sums, of which a chain has at most 6 "
            "roundings in any order. A flushed result counts once, a flushed input its weight",
            flushes=1,
        ),
        ErrorBound(
            "y",
            8,
            "magnitude |y| * (1 + |c|), as an exponential turns the rounding of its argument into a relative error: "
            "its argument, the exponential, 1 + exp, a division within 2 ulp and a product. SiLU passes on at most "
            "1.1 times the error of c. A flushed result counts once, a flushed sigmoid |c| times",
            flushes=1,
        ),
        ErrorBound("q", norm_steps, f"the error of y, and of what follows: {NORM_REASON}", norm_flushes),
        ErrorBound("k", norm_steps, f"the error of y, and of what follows: {NORM_REASON}", norm_flushes),
        ErrorBound("v", 0, "the error of y"),
        ErrorBound("g", GATE_STEPS, GATE_REASON, flushes=1),
        ErrorBound("beta", BETA_STEPS, BETA_REASON, flushes=1),
        ErrorBound("final_state", 0, "a copy"),
    ),
    edge_cases=(
        "L == 0: empty results, and the initial state (or zeros) as the final one.",
        "cu_seqlens is not read back to the host: its entries are taken to be within 0 to L, and not to decrease. Rows "
        "past its last entry are one more sequence, without a state: padding that no other row depends on.",
        "A NaN makes W rows of its channel NaN in v, and of its head in q and k; the rows of other sequences stay.",
        "What the columns of z hold changes no bit of a result, NaN included. HV must be divisible by num_k_heads with "
        "interleaved, and with an a or b of three dimensions.",
        "An infinite weight times the zero before a sequence is NaN. SiLU of -infinity is NaN.",
        "The sum of squares is fp32: beyond |y| of about 1.8e19 it is infinite, and finite elements become 0.",
        "Subnormal float32 numbers, inputs and results, may count as zero; copies are exact.",
    ),
    core=(
        "bfloat16-l2norm_True-g_exp_False",
        "width_4-bias-initial_state-int32",
        "rows_67-initial_state",
        "interleaved-h2-k16-g2-v8",
    ),
    check=_check,
    derive=_derive,
    cost=_cost,
)
