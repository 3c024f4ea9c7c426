"""`gdn_conv_prep`: a Gated DeltaNet layer from its projection to its delta rule, in one pass.

A row of `x` is [q | k | v] as the projection wrote it, with H heads of K for q and for k, and HV heads of V for v. A
causal depthwise convolution of width W over the rows of each sequence, a SiLU, then all of `gdn_post_conv`:

    c[t]   bias + sum over j < W of weight[:, j] * x[t - (W - 1) + j]
    y      c * sigmoid(c); c itself with activation=None
    q, k   y / sqrt(sum(y * y) + eps)        over the head; y itself with l2norm=False
    v      y
    g      -exp(A_log) * softplus(a + dt_bias)        exp of that with output_g_exp=True
    beta   sigmoid(b)

`cu_seqlens` [S + 1] packs S sequences: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1], and may be empty. Without
it all rows are one sequence. What lies before a sequence's first row comes from `initial_state` [S, C, W - 1], its last
W - 1 inputs, oldest first, and is zero without one; never from another sequence. `final_state` is the same after the
sequence's last row: the initial state of the call that goes on, also where the sequence has fewer than W - 1 rows.
A state may have a dtype of its own, which is final_state's too: what is copied into another dtype is rounded once.
`state_pool` [slots, C, n], n >= W - 1, holds the states of many sequences, and is updated in place of a final_state:

    sequence i owns the slot state_indices[i], or slot i without them; -1, or any number that is no slot, is none
    old    the slot's n columns; zeros where has_initial_state[i] is False or there is no slot
    what lies before the first row    the last W - 1 columns of old
    what the slot then holds          the last n columns of [old, the sequence's rows], oldest first

An empty sequence so keeps its slot, or clears it where has_initial_state is False; a slot that no sequence owns keeps
every bit. Two sequences that own one slot are an error that is not looked for.
With `interleaved` x is Qwen3-Next's whole first projection, read in place: H key heads of [q K | k K | v G*V | z G*V],
where G = HV / H, so that value head j belongs to key head j // G. The columns of z are not read. Channels of `weight`,
`bias` and the states stay [q | k | v], each with its heads in order, and the results are the same.
All arithmetic is fp32 or wider with one rounding per output: c and y are not rounded. g and beta are float32.
"""

from collections.abc import Mapping
from typing import Any

from polyfuse.spec._pools import POOL_ARGUMENTS, check_pool
from polyfuse.spec._types import (
    FLOATS,
    INTS,
    AttrSpec,
    Boundaries,
    Call,
    Cost,
    ErrorBound,
    OpSpec,
    OutputSpec,
    Step,
    TensorSpec,
)
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

CHANNELS = "2*num_k_heads*head_k_dim + HV*head_v_dim"
COLUMNS = "2*num_k_heads*head_k_dim + (1 + interleaved)*HV*head_v_dim"


def _check(call: Call) -> None:
    POST_CONV.check(call)
    heads, heads_v = call.attrs["num_k_heads"], call.dims["HV"]
    if call.attrs["interleaved"] and heads_v % heads:
        fail(NAME, "A_log", f"HV divisible by num_k_heads={heads} with interleaved=True", heads_v)
    if not 2 <= call.dims["W"] <= MAX_WIDTH:
        fail(NAME, "weight", f"a width of 2 to {MAX_WIDTH} in [{CHANNELS}, W]", call.dims["W"])
    if call.dims.get("N", 2) < 2:
        fail(NAME, "cu_seqlens", "at least 2 elements", call.dims["N"])
    check_pool(call, _sequences(call))
    before = call.dims["W"] - 1
    if call.dims.get("n", before) < before:
        fail(NAME, "state_pool", f"n >= W - 1={before} in [slots, {CHANNELS}, n]", call.dims["n"])


def _derive(call: Call) -> Mapping[str, Any]:
    sequences, channels, before = _sequences(call), _channels(call), call.dims["W"] - 1
    return {
        "S": sequences,
        "F": sequences if call.attrs["output_final_state"] else 0,
        "final_strides": (channels * before, 1, channels),
        "state": call.dtypes.get("initial_state", call.dtypes["T"]),
    }


def _sequences(call: Call) -> Any:
    return call.dims["N"] - 1 if "cu_seqlens" in call.dtypes else 1


def _channels(call: Call) -> Any:
    return 2 * call.attrs["num_k_heads"] * call.attrs["head_k_dim"] + call.dims["HV"] * call.attrs["head_v_dim"]


def _cost(call: Call) -> Cost:
    d, post = call.dims, POST_CONV.cost(call)
    channels = _channels(call)
    column = d["S"] * channels  # of all states
    read = channels * d["W"] * itemsize(call.dtypes["weight"])
    written = d["F"] * channels * (d["W"] - 1) * itemsize(call.dtypes["state"])
    for name in ("initial_state", "state_pool"):
        if name in call.dtypes:
            read += column * (d["W"] - 1) * itemsize(call.dtypes[name])
    if "state_pool" in call.dtypes:
        written += column * d["n"] * itemsize(call.dtypes["state_pool"])
    flops = d["L"] * channels * (2 * d["W"] + (6 if call.attrs["activation"] else 0))
    return Cost(post.bytes_read + read, post.bytes_written + written, post.flops + flops)


EXAMPLE = """
heads, value_heads, dim = 2, 4, 16
width = 2 * heads * dim + value_heads * dim
x, weight = torch.randn(6, width), torch.randn(width, 4)  # six rows of [q | k | v], and a conv over four
a, b = torch.randn(6, value_heads), torch.randn(6, value_heads)
A_log, dt_bias = torch.zeros(value_heads), torch.zeros(value_heads)
sizes = {"num_k_heads": heads, "head_k_dim": dim, "head_v_dim": dim}
ends = torch.tensor([0, 4, 6])  # two sequences
results = polyfuse.gdn_conv_prep(x, weight, a, b, A_log, dt_bias, cu_seqlens=ends, output_final_state=True, **sizes)
print(tuple(results.q.shape), tuple(results.v.shape), tuple(results.final_state.shape))
"""
PRINTED = "(6, 2, 16) (6, 4, 16) (2, 128, 3)"

SPEC = OpSpec(
    name=NAME,
    version=3,
    summary="Causal conv, SiLU, split, L2-normalisation and gates of a Gated DeltaNet layer, in one pass.",
    formula=__doc__ or "",
    source=(
        "Yang, Kautz, Hatamizadeh, Gated Delta Networks, arXiv:2412.06464; Gu, Dao, Mamba, arXiv:2312.00752, for the "
        "conv; Transformers Qwen3NextGatedDeltaNet; Qwen3.5"
    ),
    example=(EXAMPLE, PRINTED),
    rows="L",
    independent=True,
    groups=("S",),
    tensors=(
        TensorSpec(
            "x",
            ("L", COLUMNS),
            FLOATS,
            "[q | k | v] before the conv, or key heads of [q | k | v | z] with interleaved; any strides",
            dtype_var="T",
        ),
        TensorSpec("weight", (CHANNELS, "W"), FLOATS, "of the conv; W is 2 to 4, the last column the row itself"),
        *POST_CONV.tensors[1:],
        TensorSpec("bias", (CHANNELS,), FLOATS, "of the conv", optional=True),
        TensorSpec(
            "initial_state",
            ("S", CHANNELS, "W - 1"),
            FLOATS,
            "the inputs before each sequence, oldest first",
            optional=True,
        ),
        TensorSpec(
            "cu_seqlens",
            ("N",),
            INTS,
            "where each of the S = N - 1 sequences begins, and the end",
            optional=True,
            boundaries=Boundaries(starts=True),
        ),
        TensorSpec(
            "state_pool",
            ("slots", CHANNELS, "n"),
            FLOATS,
            "states of sequences, in place of initial_state and final_state; any strides",
            optional=True,
            updated=True,
        ),
        *POOL_ARGUMENTS,
    ),
    attrs=(
        *POST_CONV.attrs,
        AttrSpec("output_final_state", "bool", False, "return final_state; else it has no sequences"),
        AttrSpec("interleaved", "bool", False, "x is Qwen3-Next's projection: key heads of [q | k | v | z]"),
        AttrSpec("activation", "enum", "silu", "of c; None for none", values=("silu",), nullable=True),
    ),
    outputs=(
        *POST_CONV.outputs,
        OutputSpec(
            "final_state",
            ("F", CHANNELS, "W - 1"),
            "state",
            "the last inputs of each sequence, oldest first, in the dtype of initial_state or else T; rows [F, W - 1, "
            "C] in memory",
            strides="final_strides",
        ),
    ),
    errors=(
        ErrorBound(
            "c",
            6,
            "magnitude |bias| + sum |weight * x|: at most 4 products and 4 sums, of which a chain has at most 6 "
            "roundings in any order. A flushed result counts once, a flushed input its weight, a flushed weight its "
            "input",
            flushes=1,
        ),
        ErrorBound(
            "y",
            8,
            "magnitude |y| * (1 + |c|), as an exponential turns the rounding of its argument into a relative error: "
            "its argument, the exponential, 1 + exp, a division within 2 ulp and a product. SiLU passes on at most "
            "1.1 times the error of c. A flushed result counts once, a flushed sigmoid |c| times. With activation=None "
            "the error of c alone",
            flushes=1,
        ),
        ErrorBound("q", norm_steps, f"the error of y, and of what follows: {NORM_REASON}", norm_flushes),
        ErrorBound("k", norm_steps, f"the error of y, and of what follows: {NORM_REASON}", norm_flushes),
        ErrorBound("v", 0, "the error of y"),
        ErrorBound("g", GATE_STEPS, GATE_REASON, flushes=1),
        ErrorBound("beta", BETA_STEPS, BETA_REASON, flushes=1),
        ErrorBound("final_state", 0, "a copy, into another dtype with one rounding"),
        ErrorBound("state_pool", 0, "a copy, into another dtype with one rounding"),
    ),
    edge_cases=(
        "L == 0: empty results, and the initial state (or zeros) as the final one; a pool is updated all the same.",
        "cu_seqlens is not read back to the host: its entries are taken to be within 0 to L, and not to decrease. Rows "
        "past its last entry are one more sequence, without a state: padding that no other row depends on.",
        "A pool excludes initial_state and output_final_state, and a call that is given one has no gradient. Without "
        "state_indices it has at least S slots.",
        "A NaN makes W rows of its channel NaN in v, and of its head in q and k; the rows of other sequences stay.",
        "What the columns of z hold changes no bit of a result, NaN included. HV must be divisible by num_k_heads with "
        "interleaved, and with an a or b of three dimensions.",
        "An infinite weight times the zero before a sequence is NaN. SiLU of -infinity is NaN.",
        "The sum of squares is fp32: beyond |y| of about 1.8e19 it is infinite, and finite elements become 0.",
        "Subnormal float32 numbers, inputs and results, may count as zero; copies are exact.",
    ),
    core=(
        "bfloat16-l2norm_True-g_exp_False",
        "float32-l2norm_True-g_exp_False",
        "float16-l2norm_True-g_exp_False",
        "width_2-plain-one_sequence",
        "width_3-initial_state-int64",
        "width_4-bias-initial_state-int32",
        "rows_67-initial_state",
        "pool-single_rows",
        "token_stride_1-bfloat16",
        "qkv_nan_some",
        "interleaved-h2-k16-g2-v8",
        "pool-bfloat16-float32-columns_4",
        "pool-no_slot_named",
        "no_activation-nan_some",
    ),
    check=_check,
    derive=_derive,
    cost=_cost,
    steps=(
        Step(
            "inputs before the first row: zeros, or a state",
            ("initial_state", "state_pool", "state_indices", "has_initial_state", "cu_seqlens"),
        ),
        Step("causal conv over W rows, SiLU", ("x", "weight", "bias"), ("v",)),
        Step("L2 norm of each head", (), ("q", "k")),
        Step("-exp(A_log) * softplus(a + dt_bias)", ("a", "A_log", "dt_bias"), ("g",)),
        Step("sigmoid(b)", ("b",), ("beta",)),
        Step("keep the last inputs", (), ("final_state", "state_pool")),
    ),
)
