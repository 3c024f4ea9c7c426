"""`gdn_post_conv`: everything between the causal conv and the delta rule of a Gated DeltaNet layer, in one pass.

A row of `conv_out` is [q | k | v] with H heads of K for q and for k, and HV heads of V for v. Per row and head:

    q, k   x / sqrt(sum(x * x) + eps)        over the head; a plain copy with l2norm=False
    v      a copy, bit for bit
    g      -exp(A_log) * softplus(a + dt_bias)        exp of that with output_g_exp=True
    beta   sigmoid(b)

a and b are [L, HV], or [L, H, HV / H] with the value heads of a key head together, as Qwen3-Next's projection has them:
value head j belongs to key head j // (HV / H).
`eps` is inside the root: a zero vector gives zero, and |x| = 1e-4 with eps = 1e-6 gives a norm of 0.0995.
softplus(x) = max(x, 0) + log1p(exp(-|x|)), accurate over the whole line, with no threshold.
All arithmetic is fp32 or wider with one rounding per output; g and beta are float32.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Any

from polyfuse.spec._types import (
    FLOATS,
    REQUIRED,
    AttrSpec,
    Call,
    Cost,
    ErrorBound,
    OpSpec,
    OutputSpec,
    Step,
    TensorSpec,
)
from polyfuse.spec._validate import fail, itemsize

NAME = "gdn_post_conv"


def _check(call: Call) -> None:
    if not call.attrs["l2norm_eps"] > 0:
        fail(call.op.name, "l2norm_eps", "a number > 0 (a zero vector must give zero)", call.attrs["l2norm_eps"])


def _cost(call: Call) -> Cost:
    d, a = call.dims, call.attrs
    qk = 2 * a["num_k_heads"] * a["head_k_dim"]
    width = qk + d["HV"] * a["head_v_dim"]
    size = itemsize(call.dtypes["T"])
    gates = d["L"] * d["HV"]
    read = d["L"] * width * size + gates * (itemsize(call.dtypes["a"]) + itemsize(call.dtypes["b"]))
    return Cost(read, d["L"] * width * size + 2 * gates * 4, d["L"] * qk * 3 + gates * 12)


NORM_REASON = (
    "magnitude |out|. The partial sums of K positive terms are rounded up as often as down, so that a sum in any order "
    "is known to sqrt(K) roundings (four standard deviations of adding one by one), which the root halves; 2 for the "
    "squares and eps, 4 for a reciprocal root within 2 ulp and the product. A flushed result counts once, a flushed "
    "input the factor times. A copy with l2norm=False"
)
GATE_REASON = (
    "magnitude |g| * (1 + max(-x, 0) + |A_log|) with x = a + dt_bias: an exponential turns the rounding of its "
    "argument into a relative error, and softplus(x) is one below 0; both exponentials cost 2 ulp, as does log1p, and "
    "3 more products and sums. A flushed result counts once, a flushed softplus exp(A_log) times. With output_g_exp "
    "the same once more, on exp(g)"
)
BETA_REASON = "magnitude beta * (1 + |b|): an exponential as in g, 1 + exp and a division"
GATE_STEPS, BETA_STEPS = 8, 6


def norm_steps(names: Mapping[str, Any]) -> float:
    return sqrt(names["head_k_dim"]) / 2 + 6 if names["l2norm"] else 0


def norm_flushes(names: Mapping[str, Any]) -> float:
    return 1 if names["l2norm"] else 0


EXAMPLE = """
heads, value_heads, dim = 2, 4, 16
conv_out = torch.randn(6, 2 * heads * dim + value_heads * dim)  # six rows of [q | k | v]
a, b = torch.randn(6, value_heads), torch.randn(6, value_heads)
A_log, dt_bias = torch.zeros(value_heads), torch.zeros(value_heads)
sizes = {"num_k_heads": heads, "head_k_dim": dim, "head_v_dim": dim}
q, k, v, g, beta = polyfuse.gdn_post_conv(conv_out, a, b, A_log, dt_bias, **sizes)
print(tuple(q.shape), tuple(v.shape), tuple(g.shape))
"""
PRINTED = "(6, 2, 16) (6, 4, 16) (6, 4)"

SPEC = OpSpec(
    name=NAME,
    version=2,
    summary="Split, L2-normalise and gate a Gated DeltaNet layer's conv output into q, k, v, g, beta, in one pass.",
    formula=__doc__ or "",
    source=(
        "Yang, Kautz, Hatamizadeh, Gated Delta Networks, arXiv:2412.06464; Transformers Qwen3NextGatedDeltaNet; Qwen3.5"
    ),
    example=(EXAMPLE, PRINTED),
    rows="L",
    independent=True,
    tensors=(
        TensorSpec(
            "conv_out",
            ("L", "2*num_k_heads*head_k_dim + HV*head_v_dim"),
            FLOATS,
            "[q | k | v] after the causal conv and its activation; any strides",
            dtype_var="T",
        ),
        TensorSpec("a", ("L", "HV"), FLOATS, "the decay's input-dependent part; any strides", split="num_k_heads"),
        TensorSpec("b", ("L", "HV"), FLOATS, "the write strength before the sigmoid; any strides", split="num_k_heads"),
        TensorSpec("A_log", ("HV",), FLOATS, "log of the decay rate per value head"),
        TensorSpec("dt_bias", ("HV",), FLOATS, "added to a before the softplus"),
    ),
    attrs=(
        AttrSpec("num_k_heads", "int", REQUIRED, "heads of q and of k", minimum=1),
        AttrSpec("head_k_dim", "int", REQUIRED, "width of a head of q and of k", minimum=1),
        AttrSpec("head_v_dim", "int", REQUIRED, "width of a head of v", minimum=1),
        AttrSpec("l2norm", "bool", True, "normalise q and k; False copies them"),
        AttrSpec("l2norm_eps", "float", 1e-6, "added to the sum of squares, inside the root; > 0"),
        AttrSpec("output_g_exp", "bool", False, "return exp(g), the decay factor, in place of g"),
    ),
    outputs=(
        OutputSpec("q", ("L", "num_k_heads", "head_k_dim"), "T", "normalised queries"),
        OutputSpec("k", ("L", "num_k_heads", "head_k_dim"), "T", "normalised keys"),
        OutputSpec("v", ("L", "HV", "head_v_dim"), "T", "values"),
        OutputSpec("g", ("L", "HV"), "float32", "log decay, or the decay with output_g_exp"),
        OutputSpec("beta", ("L", "HV"), "float32", "write strength"),
    ),
    errors=(
        ErrorBound("q", norm_steps, NORM_REASON, norm_flushes),
        ErrorBound("k", norm_steps, NORM_REASON, norm_flushes),
        ErrorBound("v", 0, "a copy"),
        ErrorBound("g", GATE_STEPS, GATE_REASON, flushes=1),
        ErrorBound("beta", BETA_STEPS, BETA_REASON, flushes=1),
    ),
    edge_cases=(
        "L == 0: empty results, without a launch.",
        "An a or b of three dimensions: HV must be divisible by num_k_heads.",
        "The sum of squares is fp32: beyond |x| of about 1.8e19 it is infinite, and finite elements become 0.",
        "A NaN makes its head NaN in q or k, and only itself in v.",
        "Subnormal float32 numbers, inputs and results, may count as zero; copies are exact.",
    ),
    check=_check,
    core=(
        "bfloat16-l2norm_True-g_exp_False",
        "float32-l2norm_True-g_exp_True",
        "float16-l2norm_True-g_exp_False",
        "bfloat16-l2norm_False-g_exp_False",
        "rows_1",
        "rows_67",
        "gates_split-h2-g2",
        "token_stride_1-bfloat16",
        "row_strided-float32",
        "dims_k128-v64-heads2",
        "qkv_zeros",
        "qkv_nan_some",
        "gates_wide_line-g_exp_False",
    ),
    cost=_cost,
    steps=(
        Step("split the row into q, k and v", ("conv_out",), ("v",)),
        Step("L2 norm of each head", (), ("q", "k")),
        Step("-exp(A_log) * softplus(a + dt_bias)", ("a", "A_log", "dt_bias"), ("g",)),
        Step("sigmoid(b)", ("b",), ("beta",)),
    ),
)
