"""`gdn_post_conv`: everything between the causal conv and the delta rule of a Gated DeltaNet layer, in one pass.

A row of `conv_out` is [q | k | v] with H heads of K for q and for k, and HV heads of V for v. Per row and head:

    q, k   x / sqrt(sum(x * x) + eps)        over the head; a plain copy with l2norm=False
    v      a copy, bit for bit
    g      -exp(A_log) * softplus(a + dt_bias)        exp of that with output_g_exp=True
    beta   sigmoid(b)

`eps` is inside the root: a zero vector gives zero, and |x| = 1e-4 with eps = 1e-6 gives a norm of 0.0995.
softplus(x) = max(x, 0) + log1p(exp(-|x|)), accurate over the whole line, with no threshold.
All arithmetic is fp32 or wider with one rounding per output; g and beta are float32.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from polyfuse.spec._types import (
    FLOATS,
    REQUIRED,
    AttrSpec,
    Call,
    Case,
    Cost,
    ErrorBound,
    OpSpec,
    OutputSpec,
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


_SMALL = {"L": 5, "HV": 4}
_HEADS = {"num_k_heads": 2, "head_k_dim": 16, "head_v_dim": 8}


def _cases() -> Iterator[Case]:
    for norm, exp, dtype in product((True, False), (True, False), FLOATS):
        dtypes = {"T": dtype, "a": dtype, "b": dtype}
        yield Case(f"{dtype}-l2norm_{norm}-g_exp_{exp}", _SMALL, _HEADS | {"l2norm": norm, "output_g_exp": exp}, dtypes)
    for length in (0, 1, 2, 67):
        yield Case(f"rows_{length}", {"L": length, "HV": 4}, _HEADS, {"T": "bfloat16"})
    for key, value, heads in ((24, 40, 3), (1, 1, 1), (80, 96, 4), (128, 64, 2), (256, 256, 1)):
        attrs = {"num_k_heads": heads, "head_k_dim": key, "head_v_dim": value}
        yield Case(f"dims_k{key}-v{value}-heads{heads}", {"L": 9, "HV": 2 * heads}, attrs, {"T": "bfloat16"})
    yield Case("one_value_head", {"L": 7, "HV": 1}, _HEADS, {"T": "bfloat16"})
    yield Case("gates_float32", _SMALL, _HEADS, {"T": "bfloat16", "a": "float32", "b": "float16", "A_log": "bfloat16"})
    for layout, dtype in product(("row_strided", "token_stride_1"), ("bfloat16", "float32")):
        yield Case(
            f"{layout}-{dtype}",
            {"L": 37, "HV": 4},
            _HEADS,
            {"T": dtype, "a": dtype, "b": dtype},
            layout={"conv_out": layout, "a": layout, "b": layout},
        )
    for fill in ("zeros", "tiny_vectors", "nan_some", "inf_some", "subnormal", "large"):
        yield Case(f"qkv_{fill}", {"L": 11, "HV": 4}, _HEADS, fill={"conv_out": fill})
    yield Case("eps_large", _SMALL, _HEADS | {"l2norm_eps": 0.5})
    for exp in (False, True):
        for fill in ("wide_line", "nan_some", "inf_some"):
            gates = {"a": fill, "b": fill, "dt_bias": "zeros" if fill == "wide_line" else "normal"}
            yield Case(f"gates_{fill}-g_exp_{exp}", {"L": 64, "HV": 4}, _HEADS | {"output_g_exp": exp}, fill=gates)
    # 300,000 rows: more than 2**31 elements.
    attrs = {"num_k_heads": 16, "head_k_dim": 128, "head_v_dim": 128}
    yield Case("over_2_31", {"L": 600, "HV": 32}, attrs, {"T": "bfloat16"}, repeat=500)


_NORM_BOUND = (
    "magnitude |out|. A sum of K positive terms is known to K roundings in any order, the root halves that; "
    "2 for the squares and eps, 4 for a reciprocal root within 2 ulp and the product. Plus 2^-126 * (1 + the factor) "
    "for a flushed result and a flushed input"
)


def _norm_steps(names: Mapping[str, Any]) -> float:
    return names["head_k_dim"] / 2 + 6 if names["l2norm"] else 0


SPEC = OpSpec(
    name=NAME,
    version=1,
    summary="Split, L2-normalise and gate a Gated DeltaNet layer's conv output into q, k, v, g, beta, in one pass.",
    formula=__doc__ or "",
    source=(
        "Yang, Kautz, Hatamizadeh, Gated Delta Networks, arXiv:2412.06464; Transformers Qwen3NextGatedDeltaNet; Qwen3.5"
    ),
    rows="L",
    tensors=(
        TensorSpec(
            "conv_out",
            ("L", "2*num_k_heads*head_k_dim + HV*head_v_dim"),
            FLOATS,
            "[q | k | v] after the causal conv and its activation; any strides",
            dtype_var="T",
        ),
        TensorSpec("a", ("L", "HV"), FLOATS, "the decay's input-dependent part"),
        TensorSpec("b", ("L", "HV"), FLOATS, "the write strength before the sigmoid"),
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
        ErrorBound("q", _norm_steps, _NORM_BOUND),
        ErrorBound("k", _norm_steps, _NORM_BOUND),
        ErrorBound("v", lambda names: 0, "a copy"),
        ErrorBound(
            "g",
            lambda names: 8,
            "magnitude |g| * (1 + |a + dt_bias| + |A_log|): an exponential turns the rounding of its argument x into "
            "a relative error of |x| roundings, and itself costs 2 ulp; 3 more products and sums. With output_g_exp "
            "the same once more, on exp(g)",
        ),
        ErrorBound("beta", lambda names: 6, "magnitude beta * (1 + |b|): exponential as in g, 1 + exp and a division"),
    ),
    edge_cases=(
        "L == 0: empty results, without a launch.",
        "The sum of squares is fp32: beyond |x| of about 1.8e19 it is infinite, and finite elements become 0.",
        "A NaN makes its head NaN in q or k, and only itself in v.",
        "Subnormal float32 numbers, inputs and results, may count as zero; copies are exact.",
    ),
    check=_check,
    derive=lambda call: {},
    cost=_cost,
    cases=lambda: tuple(_cases()),
)
