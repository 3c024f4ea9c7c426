"""`gdn_conv_prep`: a Gated DeltaNet layer from its projection to its delta rule, in one pass.

A row of `x` is [q | k | v] as the projection wrote it. A causal depthwise convolution of width W over the rows of each
sequence, a SiLU, then all of `gdn_post_conv`:

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
All arithmetic is fp32 or wider with one rounding per output: c and y are not rounded. g and beta are float32.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from polyfuse.spec._types import FLOATS, INTS, AttrSpec, Call, Case, Cost, ErrorBound, OpSpec, OutputSpec, TensorSpec
from polyfuse.spec._validate import fail, itemsize
from polyfuse.spec.gdn_post_conv import SPEC as POST_CONV

NAME = "gdn_conv_prep"

MAX_WIDTH = 4

CONV_STEPS = 6  # at most 4 products and 4 sums, of which a chain has at most 6 roundings in any order
SILU_STEPS = 8  # exponential and its argument, 1 + exp, a division within 2 ulp, a product
SILU_SLOPE = 1.1  # the largest derivative of SiLU is 1.0998

_CHANNELS = "2*num_k_heads*head_k_dim + HV*head_v_dim"


def _check(call: Call) -> None:
    POST_CONV.check(call)
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


_HEADS = {"num_k_heads": 2, "head_k_dim": 16, "head_v_dim": 8}
_SMALL = {"L": 5, "HV": 4, "W": 4}
_PACKED = {"L": 23, "HV": 4, "W": 4, "N": 9, "S": 8}  # lengths 2, 0, 5, 3, 1, 6, 4, 2
_FINAL = {"output_final_state": True}


def _cases() -> Iterator[Case]:
    for norm, exp, dtype in product((True, False), (True, False), FLOATS):
        dtypes = {"T": dtype, "weight": dtype, "a": dtype, "b": dtype}
        yield Case(f"{dtype}-l2norm_{norm}-g_exp_{exp}", _SMALL, _HEADS | {"l2norm": norm, "output_g_exp": exp}, dtypes)
    for width, optional, index in product(
        (2, 3, 4), ((), ("bias",), ("initial_state",), ("bias", "initial_state")), ("", "int32", "int64")
    ):
        dims = _PACKED | {"W": width} if index else {"L": 23, "HV": 4, "W": width, "S": 1}
        yield Case(
            f"width_{width}-{'-'.join(optional) or 'plain'}-{index or 'one_sequence'}",
            dims,
            _HEADS | _FINAL,
            {"T": "bfloat16", "weight": "bfloat16", "cu_seqlens": index},
            present=(*optional, "cu_seqlens") if index else optional,
            fill={"cu_seqlens": "cu_seqlens"},
        )
    for length, state in product((0, 1, 2, 3, 67), ((), ("initial_state",))):
        dims = {"L": length, "HV": 4, "W": 4, "S": 1}
        name = f"rows_{length}{'-initial_state' if state else ''}"
        yield Case(name, dims, _HEADS | _FINAL, {"T": "bfloat16"}, present=state)
    yield Case(
        "long_sequences",
        {"L": 23 * 40, "HV": 4, "W": 4, "N": 9, "S": 8},
        _HEADS | _FINAL,
        {"T": "bfloat16"},
        present=("bias", "initial_state", "cu_seqlens"),
        fill={"cu_seqlens": "cu_seqlens_x40"},
    )
    yield Case(
        "many_sequences",
        {"L": 902, "HV": 2, "W": 4, "N": 301, "S": 300},  # 2, 0, 5, 3, 1, 6, 4, ...: 899 rows, and 3 past the last
        {"num_k_heads": 1, "head_k_dim": 8, "head_v_dim": 8} | _FINAL,
        {"T": "bfloat16"},
        present=("initial_state", "cu_seqlens"),
        fill={"cu_seqlens": "cu_seqlens"},
    )
    yield Case("final_state_off", _PACKED, _HEADS, present=("cu_seqlens",), fill={"cu_seqlens": "cu_seqlens"})
    for key, value, heads in ((24, 40, 3), (1, 1, 1), (80, 96, 4), (128, 64, 2), (256, 256, 1)):
        attrs = {"num_k_heads": heads, "head_k_dim": key, "head_v_dim": value}
        yield Case(f"dims_k{key}-v{value}-heads{heads}", {"L": 9, "HV": 2 * heads, "W": 4}, attrs, {"T": "bfloat16"})
    yield Case("one_value_head", {"L": 7, "HV": 1, "W": 4}, _HEADS, {"T": "bfloat16"})
    mixed = {"T": "bfloat16", "weight": "float32", "bias": "float16", "a": "float32", "b": "float16"}
    yield Case("mixed_dtypes", _SMALL, _HEADS, mixed, present=("bias",))
    for layout, dtype in product(("row_strided", "token_stride_1"), ("bfloat16", "float32")):
        yield Case(
            f"{layout}-{dtype}",
            {"L": 37, "HV": 4, "W": 4, "S": 1},
            _HEADS | _FINAL,
            {"T": dtype, "weight": dtype},
            present=("initial_state",),
            layout=dict.fromkeys(("x", "weight", "a", "b", "initial_state"), layout),
        )
    for fill in ("zeros", "tiny_vectors", "nan_some", "inf_some", "subnormal", "large"):
        state = {"cu_seqlens": "cu_seqlens", "x": fill, "initial_state": fill}
        yield Case(f"qkv_{fill}", _PACKED, _HEADS | _FINAL, fill=state, present=("initial_state", "cu_seqlens", "bias"))
    yield Case("eps_large", _SMALL, _HEADS | {"l2norm_eps": 0.5})
    for exp, fill in product((False, True), ("wide_line", "nan_some", "inf_some")):
        gates = {"a": fill, "b": fill, "dt_bias": "zeros" if fill == "wide_line" else "normal"}
        yield Case(f"gates_{fill}-g_exp_{exp}", {"L": 64, "HV": 4, "W": 4}, _HEADS | {"output_g_exp": exp}, fill=gates)
    # 300,000 rows: more than 2**31 elements. The last rows are zero, so that each repetition begins as the first does.
    attrs = {"num_k_heads": 16, "head_k_dim": 128, "head_v_dim": 128}
    dims = {"L": 600, "HV": 32, "W": 4}
    yield Case("over_2_31", dims, attrs, {"T": "bfloat16", "weight": "bfloat16"}, fill={"x": "zero_tail"}, repeat=500)


_CONV_BOUND = (
    "on c 6 roundings of |bias| + sum |weight * x|, of which SiLU passes on at most 1.1 times, and 8 of its own of "
    "magnitude |y| * (1 + |c|), as an exponential turns the rounding of its argument into a relative error"
)


SPEC = OpSpec(
    name=NAME,
    version=1,
    summary="Causal conv, SiLU, split, L2-normalisation and gates of a Gated DeltaNet layer, in one pass.",
    formula=__doc__ or "",
    source=(
        "Yang, Kautz, Hatamizadeh, Gated Delta Networks, arXiv:2412.06464; Gu, Dao, Mamba, arXiv:2312.00752, for the "
        "conv; Transformers Qwen3NextGatedDeltaNet; Qwen3.5"
    ),
    rows="L",
    tensors=(
        TensorSpec("x", ("L", _CHANNELS), FLOATS, "[q | k | v] before the conv; any strides", dtype_var="T"),
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
        *(ErrorBound(name, POST_CONV.bound(name).steps, f"as in gdn_post_conv, on y; {_CONV_BOUND}") for name in "qk"),
        ErrorBound("v", lambda names: 0, f"that of y; {_CONV_BOUND}"),
        POST_CONV.bound("g"),
        POST_CONV.bound("beta"),
        ErrorBound("final_state", lambda names: 0, "a copy"),
    ),
    edge_cases=(
        "L == 0: empty results, and the initial state (or zeros) as the final one.",
        "cu_seqlens is not read back to the host: its entries are taken to be within 0 to L, and not to decrease. Rows "
        "past its last entry are one more sequence, without a state: padding that no other row depends on.",
        "A NaN makes W rows of its channel NaN in v, and of its head in q and k; the rows of other sequences stay.",
        "An infinite weight times the zero before a sequence is NaN. SiLU of -infinity is NaN.",
        "The sum of squares is fp32: beyond |y| of about 1.8e19 it is infinite, and finite elements become 0.",
        "Subnormal float32 numbers, inputs and results, may count as zero; copies are exact.",
    ),
    check=_check,
    derive=_derive,
    cost=_cost,
    cases=lambda: tuple(_cases()),
)
