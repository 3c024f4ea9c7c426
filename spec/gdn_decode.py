"""`gdn_decode`: one step of generation of a Gated DeltaNet layer, everything between its two projections.

x [B, C] holds one token of each of B sequences, in the columns [q | k | v] of `gdn_conv_prep`. Per sequence, with S
the recurrent state [K, V] of a value head, whose key head is j // (HV / H) for value head j:

    c      bias + sum over i < W of weight[:, i] * window[:, i]        the last W - 1 inputs of the conv state, then x
    y      c * sigmoid(c), which is [q | k | v]
    q, k   y / sqrt(sum(y * y) + l2norm_eps)        over the head
    g      -exp(A_log) * softplus(a + dt_bias)
    beta   sigmoid(b)
    S      exp(g) * S
    d      beta * (v - S^T k)
    S      S + k d^T
    o      scale * S^T q        scale is 1 / sqrt(K) if not given
    out    o / sqrt(mean(o * o) + norm_eps) * norm_weight * z * sigmoid(z)        over the head

This is `gdn_conv_prep`, `gated_delta_rule` and `gated_rms_norm` one after another, without the roundings in between:
all arithmetic is fp32 or wider, out is rounded once, and so is the new S when it is stored. o is computed from the new
S before that rounding.

**States.** Both are pools that are updated in place: conv_state [slots, channels, n], n >= W - 1, whose last W - 1
columns are read, oldest first; recurrent_state [slots, HV, K, V]. Sequence b has slot `state_indices[b]` of both, or
slot b without state_indices. After the call its conv state holds the last n columns of [the n columns before, x], and
its recurrent state the new S. The conv state stores x rounded to its dtype; the step itself uses x as it is. Of a
sequence whose index is -1 nothing is read and nothing written, and its row of out is zero. All other slots keep their
bits.

**Several tokens of a sequence**, as speculative decoding verifies them: x is [B, T, C] with T up to 8, and z, a, b and
out have the same two dimensions. The tokens of a sequence follow one another; S is carried from one to the next without
a rounding.
`state_indices` [B, T] must be given. The S after token t is stored in slot state_indices[b, t] of recurrent_state, so
that each of the tokens can be the last one that is accepted. conv_state has n = W - 1 + T - 1 columns, in slot
state_indices[b, 0]. `num_accepted` [B], from 1 to T, is how many of the previous call's tokens were accepted, and this
call goes on behind the last of them: it reads S from slot state_indices[b, num_accepted[b] - 1], and the W - 1 inputs
before its first token from the columns of conv_state that begin at num_accepted[b] - 1. Without num_accepted, as after
a prompt, S is read from slot state_indices[b, 0], and the inputs are the last W - 1 columns. Afterwards the conv state
is [the last W - 2 of the inputs read, the T new ones], from which num_accepted of the next call selects as described.
A sequence's tokens from its first index of -1 on are padding: zero rows of out, and in no state. With T' tokens before
them only the first W - 2 + T' columns of the conv state are written, with the T' inputs behind those W - 2; the columns
past them keep their bits. A sequence whose first index is -1 is padding as a whole, whatever num_accepted holds for it.

With `interleaved` x is Qwen3-Next's whole first projection, read in place: H key heads of [q K | k K | v G*V | z G*V],
where G = HV / H, and z is None. Channels of conv_weight, conv_bias and conv_state stay [q | k | v].
"""

from collections.abc import Mapping
from math import isfinite, prod, sqrt
from typing import Any

from polyfuse.spec._types import (
    FLOATS,
    INTS,
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
from polyfuse.spec.gdn_conv_prep import CHANNELS, COLUMNS, MAX_WIDTH
from polyfuse.spec.gdn_conv_prep import SPEC as CONV_PREP
from polyfuse.spec.gdn_post_conv import (
    BETA_REASON,
    BETA_STEPS,
    GATE_REASON,
    GATE_STEPS,
    NORM_REASON,
    norm_flushes,
    norm_steps,
)

NAME = "gdn_decode"

MAX_TOKENS = 8


def _check(call: Call) -> None:
    attrs, dims = call.attrs, call.dims
    for name in ("l2norm_eps", "norm_eps"):
        if not (attrs[name] > 0 and isfinite(attrs[name])):
            fail(NAME, name, "a finite number > 0 (a zero vector must give zero)", attrs[name])
    if attrs["interleaved"] and "z" in call.dtypes:
        fail(NAME, "z", "None with interleaved=True, where z is in x", "an array")
    if not attrs["interleaved"] and "z" not in call.dtypes:
        fail(NAME, "z", "an array", None)
    if dims["HV"] % attrs["num_k_heads"]:
        fail(NAME, "A_log", f"HV divisible by num_k_heads={attrs['num_k_heads']}", dims["HV"])
    if not 2 <= dims["W"] <= MAX_WIDTH:
        fail(NAME, "conv_weight", f"a width of 2 to {MAX_WIDTH} in [{CHANNELS}, W]", dims["W"])
    _check_form(call)


def _check_form(call: Call) -> None:
    """What depends on whether x holds one token of a sequence or several."""
    dims, lead = call.dims, call.dims["..."]
    if len(lead) not in (1, 2):
        fail(NAME, "x", "[B, C] or [B, T, C]", f"{len(lead) + 1} dimensions")
    least, reason = (1, "") if "state_indices" in call.dtypes else (lead[0], " without state_indices")
    for name, slots in (("conv_state", dims["conv_slots"]), ("recurrent_state", dims["slots"])):
        if slots < least:
            fail(NAME, name, f"at least {least} slots{reason}", slots)
    if len(lead) == 2:
        if not 1 <= lead[1] <= MAX_TOKENS:
            fail(NAME, "x", f"1 to {MAX_TOKENS} tokens T in [B, T, C]", lead[1])
        if "state_indices" not in call.dtypes:
            fail(NAME, "state_indices", "a slot for each token of x [B, T, C]", None)
        columns = dims["W"] + lead[1] - 2
        if dims["n"] != columns:
            fail(NAME, "conv_state", f"n = W - 1 + T - 1 = {columns} columns for x [B, T, C]", dims["n"])
        if dims.get("B", lead[0]) != lead[0]:
            fail(NAME, "num_accepted", f"B={lead[0]} elements, as x [B, T, C]", dims["B"])
        return
    if "num_accepted" in call.dtypes:
        fail(NAME, "num_accepted", "None for x [B, C], which has one token of each sequence", "an array")
    if dims["n"] < dims["W"] - 1:
        fail(NAME, "conv_state", f"n >= W - 1 = {dims['W'] - 1} columns", dims["n"])


def _cost(call: Call) -> Cost:
    d, a = call.dims, call.attrs
    batch, tokens = d["..."][0], prod(d["..."])
    heads, key, value = a["num_k_heads"], a["head_k_dim"], a["head_v_dim"]
    channels, values = 2 * heads * key + d["HV"] * value, d["HV"] * value
    size = {name: itemsize(dtype) for name, dtype in call.dtypes.items()}
    read = channels * d["W"] * size["conv_weight"] + tokens * (channels * size["T"] + d["HV"] * (size["a"] + size["b"]))
    read += tokens * values * size["T" if a["interleaved"] else "z"]
    conv = batch * channels * d["n"] * size["conv_state"]
    state = values * key * size["recurrent_state"]
    flops = tokens * (channels * (2 * d["W"] + 6) + 8 * values * key + 20 * values)
    return Cost(read + conv + batch * state, tokens * (values * size["T"] + state) + conv, flops)


def _norm_steps(names: Mapping[str, Any]) -> float:
    return norm_steps({**names, "l2norm": True})


def _norm_flushes(names: Mapping[str, Any]) -> float:
    return norm_flushes({**names, "l2norm": True})


def _sum_steps(names: Mapping[str, Any]) -> float:
    return sqrt(names["head_k_dim"]) + 3


def _sum_flushes(names: Mapping[str, Any]) -> float:
    return names["head_k_dim"]


def _out_steps(names: Mapping[str, Any]) -> float:
    return sqrt(names["head_v_dim"]) / 2 + 10


EXAMPLE = """
heads, value_heads, dim = 2, 4, 16
width, values = 2 * heads * dim + value_heads * dim, value_heads * dim
sizes = {"num_k_heads": heads, "head_k_dim": dim, "head_v_dim": dim}
x, z, a, b = (torch.randn(3, columns) for columns in (width, values, value_heads, value_heads))  # three sequences
weights = torch.randn(width, 4), torch.zeros(value_heads), torch.zeros(value_heads), torch.ones(dim)
states = torch.zeros(3, width, 3), torch.zeros(3, value_heads, dim, dim)
out = polyfuse.gdn_decode(x, z, a, b, *weights, *states, **sizes)
print(tuple(out.shape), states[1].any().item())
"""
PRINTED = "(3, 64) True"

SPEC = OpSpec(
    name=NAME,
    version=1,
    summary="One step of generation of a Gated DeltaNet layer between its two projections, with its states in place.",
    formula=__doc__ or "",
    source=(
        "Yang, Kautz, Hatamizadeh, Gated Delta Networks, arXiv:2412.06464; Transformers Qwen3NextGatedDeltaNet, "
        "Qwen3NextRMSNormGated; Qwen3.5"
    ),
    example=(EXAMPLE, PRINTED),
    rows="...",
    independent=True,
    groups=("B",),
    tensors=(
        TensorSpec(
            "x",
            ("...", COLUMNS),
            FLOATS,
            "[q | k | v] before the conv of each sequence [B] or of its tokens [B, T], or key heads of [q | k | v | z] "
            "with interleaved; any strides",
            dtype_var="T",
        ),
        TensorSpec(
            "z",
            ("...", "HV*head_v_dim"),
            FLOATS,
            "what the result is gated by, before the SiLU; None exactly with interleaved; any strides",
            optional=True,
            by_position=True,
        ),
        TensorSpec("a", ("...", "HV"), FLOATS, "the decay's input-dependent part; any strides", split="num_k_heads"),
        TensorSpec(
            "b", ("...", "HV"), FLOATS, "the write strength before the sigmoid; any strides", split="num_k_heads"
        ),
        TensorSpec(
            "conv_weight", (CHANNELS, "W"), FLOATS, "of the conv; W is 2 to 4, the last column the token itself"
        ),
        TensorSpec("A_log", ("HV",), FLOATS, "log of the decay rate per value head"),
        TensorSpec("dt_bias", ("HV",), FLOATS, "added to a before the softplus"),
        TensorSpec("norm_weight", ("head_v_dim",), FLOATS, "of the RMS norm"),
        TensorSpec(
            "conv_state",
            ("conv_slots", CHANNELS, "n"),
            FLOATS,
            "the inputs before each sequence's token, oldest first; n >= W - 1; any strides",
            updated=True,
        ),
        TensorSpec(
            "recurrent_state",
            ("slots", "HV", "head_k_dim", "head_v_dim"),
            FLOATS,
            "S of each value head; any strides",
            updated=True,
        ),
        TensorSpec("conv_bias", (CHANNELS,), FLOATS, "of the conv", optional=True),
        TensorSpec("state_indices", ("...",), INTS, "the slot of each sequence or token, -1 for none", optional=True),
        TensorSpec(
            "num_accepted",
            ("B",),
            INTS,
            "with x [B, T, C]: how many tokens of the previous call were accepted, 1 to T",
            optional=True,
        ),
    ),
    attrs=(
        AttrSpec("num_k_heads", "int", REQUIRED, "heads of q and of k", minimum=1),
        AttrSpec("head_k_dim", "int", REQUIRED, "width of a head of q and of k", minimum=1),
        AttrSpec("head_v_dim", "int", REQUIRED, "width of a head of v", minimum=1),
        AttrSpec("interleaved", "bool", False, "x is Qwen3-Next's projection: key heads of [q | k | v | z]"),
        AttrSpec("l2norm_eps", "float", 1e-6, "added to the sum of squares of q and of k, inside the root; > 0"),
        AttrSpec("norm_eps", "float", 1e-6, "added to the mean square of o, inside the root; > 0"),
        AttrSpec("scale", "float", None, "factor of o; 1 / sqrt(head_k_dim) if not given"),
    ),
    outputs=(
        OutputSpec("out", ("...", "HV*head_v_dim"), "T", "normalised and gated: what the layer's last weight takes"),
    ),
    errors=(
        CONV_PREP.bound("c"),
        CONV_PREP.bound("y"),
        ErrorBound("q, k", _norm_steps, f"the error of y, and of what follows: {NORM_REASON}", _norm_flushes),
        ErrorBound("g", GATE_STEPS, f"of exp(g): {GATE_REASON}", flushes=1),
        ErrorBound("beta", BETA_STEPS, BETA_REASON, flushes=1),
        ErrorBound(
            "d",
            _sum_steps,
            "the errors of exp(g), S, k, v and beta, each times what it is multiplied by; and magnitude "
            "beta * (|v| + exp(g) * |S|^T |k|): a sum of K products is known to sqrt(K) roundings, as above, and 3 for "
            "the decay, the difference and the product. One flushed number for each of the K products, which counts "
            "beta times; a flushed S or exp(g) * S |k| times",
            _sum_flushes,
        ),
        ErrorBound(
            "recurrent_state",
            3,
            "the errors of exp(g), S, k and d, each times what it is multiplied by; and magnitude "
            "exp(g) * |S| + |k d^T|: two products and a sum. A flushed number counts once, a flushed S exp(g) times, a "
            "flushed d |k| times. For the second token of a sequence and later ones S has the error that it was left "
            "with",
            flushes=1,
        ),
        ErrorBound(
            "o",
            _sum_steps,
            "the errors of exp(g), d, k, q and of the S before, each times what it is multiplied by, and the roundings "
            "of the new S; and magnitude scale * (exp(g) * |S| + |k d^T|)^T |q|: a sum as in d, and 3 for the scale, "
            "rounded, and products. One flushed number for each of the K products, which counts scale times; a flushed "
            "o once",
            _sum_flushes,
        ),
        ErrorBound(
            "act",
            8,
            "silu(z), of magnitude |z * sigmoid(z)| * (1 + max(-z, 0)): an exponential turns the rounding of its "
            "argument into a relative error; 2 for an exponential within 2 ulp, 1 for 1 + exp, 4 for a division within "
            "2 ulp, 1 for the product. A flushed z or result counts once, a flushed sigmoid |z| times",
            flushes=1,
        ),
        ErrorBound(
            "out",
            _out_steps,
            "the error of o, each end of its interval over the largest or least root mean square that the others "
            "allow; that of act times the rest; and magnitude |out|: a sum of V squares is known to sqrt(V) roundings, "
            "which the root halves, 3 for half of those of squares, mean and eps, 4 for a reciprocal root within 2 ulp "
            "and the product, 3 for the weight and act. A flushed result counts once, any other flushed number what "
            "multiplies it",
            flushes=1,
        ),
        ErrorBound("conv_state", 0, "copies, of x rounded to the state's dtype"),
    ),
    edge_cases=(
        "B == 0: an empty result, states unchanged.",
        "Two sequences on one slot, an index outside -1 to slots - 1, or a num_accepted outside 1 to T of a sequence "
        "with a slot, are the caller's error: nothing is read back to the host to check it. Where num_accepted selects "
        "an index of -1, S is read as zero.",
        "A NaN in x, in z or in a state that is read reaches the heads of its own sequence that depend on it, and no "
        "other sequence. Slots that no sequence has may hold anything.",
        "g of -infinity resets a finite S: exp(g) is 0. Other infinities follow IEEE 754 in the formula as written.",
        "The sums of squares are fp32: beyond about 1.8e19 they are infinite, and finite elements become 0.",
        "Gradients are refused: the states are written in place.",
        "Subnormal float32 numbers, inputs and results, may count as zero; copies are exact.",
    ),
    core=(
        "bfloat16-float32",
        "float32-float32",
        "float16-float16",
        "bfloat16-bfloat16",
        "indices_int32-h2-hv4",
        "bias-bfloat16",
        "width_2-n_1-int32",
        "interleaved-bfloat16",
        "tokens_4-int32-accepted",
        "tokens_2-padded",
        "column_strided-bfloat16",
        "pools_swapped-float32",
        "all_padding",
        "nan_in_one_sequence",
    ),
    check=_check,
    cost=_cost,
    steps=(
        Step(
            "conv of the token and the inputs that were kept, SiLU",
            ("x", "conv_weight", "conv_bias", "conv_state", "state_indices", "num_accepted"),
            ("conv_state",),
        ),
        Step("L2 norm of the heads of q and k"),
        Step("decay g and write strength beta", ("a", "b", "A_log", "dt_bias")),
        Step("S = exp(g) * S", ("recurrent_state",)),
        Step("S = S + k d^T, with d = beta * (v - S^T k)", (), ("recurrent_state",)),
        Step("o = scale * S^T q"),
        Step("RMS norm, weight, times SiLU of z", ("norm_weight", "z"), ("out",)),
    ),
)
