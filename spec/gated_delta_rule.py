"""`gated_delta_rule`: the recurrence of a Gated DeltaNet layer over the rows of packed sequences.

Per sequence and value head, with a state S [K, V] that begins as `initial_state`, or as zero, for each row t:

    S      exp(g[t]) * S
    d      beta[t] * (v[t] - S^T k[t])
    S      S + k[t] d^T
    o[t]   scale * S^T q[t]

Value head j reads key head j // (HV / H). `scale` is 1 / sqrt(K) if it is not given. `final_state` is S after each
sequence's last row: the initial state of the call that goes on.

`state_pool` [slots, HV, K, V] holds the states of many sequences, and is updated in place of a final_state:

    sequence i owns the slot state_indices[i], or slot i without them; -1, or any number that is no slot, is none
    before    S is what its slot holds; zero where has_initial_state[i] is False or there is no slot
    after     the slot holds S, rounded once to the dtype of the pool

An empty sequence so keeps its slot, or clears it where has_initial_state is False; a slot that no sequence owns keeps
every bit. Two sequences that own one slot are an error that is not looked for.

`cu_seqlens` [S + 1] packs S sequences: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1], and may be empty: it then
keeps its state. Without it all rows are one sequence. No row depends on another sequence: whatever that holds, NaN and
infinity included. Rows before the first boundary and past the last one give zero.

The state is fp32 or wider, and so are all sums; o is rounded once. A backend may take chunks of 64 rows, counted from
the sequence's start. With G the running sum of g in the chunk, and S the state before it:

    decay[i, j]   exp(G[i] - G[j]) for j <= i, else 0
    A             inverse of I + the part below the diagonal of beta[i] * decay[i, j] * k[i] . k[j]
    u, w          A (beta * v), A (beta * exp(G) * k)
    d             u - w S
    P[i, j]       decay[i, j] * q[i] . k[j]
    o             scale * (exp(G) * q S + P d)
    S             exp(G[last]) * S + (decay[last] * k)^T d

Of 16-bit q, k and v the operands of these products (A, beta v, beta exp(G) k, u, w, S, d, exp(G) q, P, decay k) may
each be rounded to the dtype once, as matrix units need it, but never the state that the next chunk begins with. The
same holds where factors stand elsewhere, as in d = (A beta) (v - exp(G) (k S)), or k^T (decay[last] * d).
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from polyfuse.spec._pools import POOL_ARGUMENTS, check_pool
from polyfuse.spec._types import (
    FLOATS,
    FP32_ROUNDOFF,
    FP32_TINY,
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
from polyfuse.spec.segment_attention import HALF_STEP, ROUNDOFF

NAME = "gated_delta_rule"

CHUNK = 64  # rows that a backend may take together, counted from the start of their sequence
LEAST_G = -120.0  # exp of it is 0 in float32, as of anything below


def _check(call: Call) -> None:
    heads, heads_v, scale = call.dims["H"], call.dims["HV"], call.attrs["scale"]
    if (heads == 0) != (heads_v == 0) or (heads and heads_v % heads):
        fail(NAME, "v", f"HV divisible by H={heads} in [L, HV, V]", heads_v)
    if scale is not None and not (scale > 0 and isfinite(scale)):
        fail(NAME, "scale", "a finite number > 0", scale)
    if call.dims.get("N", 2) < 2:
        fail(NAME, "cu_seqlens", "at least 2 elements", call.dims["N"])
    check_pool(call, _sequences(call))


def _derive(call: Call) -> Mapping[str, Any]:
    """The sizes of the states, and what rounding an operand to T costs, in the units of an error bound."""
    sequences = _sequences(call)
    dtype = call.dtypes["T"]
    return {
        "S": sequences,
        "F": sequences if call.attrs["output_final_state"] else 0,
        "operand_steps": ROUNDOFF.get(dtype, 0.0) / FP32_ROUNDOFF,
        "operand_flushes": HALF_STEP.get(dtype, FP32_TINY) / FP32_TINY,
    }


def _sequences(call: Call) -> Any:
    return call.dims["N"] - 1 if "cu_seqlens" in call.dtypes else 1


def _cost(call: Call) -> Cost:
    """Every array once, and the products of the chunked form.

    Each row and value head meets K * V state elements three times (w S, q S, k^T d), and up to 64 rows of its chunk in
    k k^T and q k^T (K each), in u and P d (V each), and in w (K).
    """
    d = call.dims
    size = itemsize(call.dtypes["T"])
    values = d["L"] * d["HV"] * d["V"] * size
    read = 2 * d["L"] * d["H"] * d["K"] * size + values + 8 * d["L"] * d["HV"]
    state = 4 * d["HV"] * d["K"] * d["V"]
    if "initial_state" in call.dtypes:
        read += d["S"] * state
    per_row = 6 * d["K"] * d["V"] + CHUNK * (3 * d["K"] + 2 * d["V"])
    written = values + d["F"] * state
    if "state_pool" in call.dtypes:
        pooled = d["S"] * d["HV"] * d["K"] * d["V"] * itemsize(call.dtypes["state_pool"])
        read, written = read + pooled, written + pooled
    return Cost(read, written, d["L"] * d["HV"] * per_row)


EXAMPLE = """
q, k = torch.nn.functional.normalize(torch.randn(2, 6, 2, 16), dim=-1)  # six rows, two key heads
v = torch.randn(6, 4, 16)  # four value heads
g, beta = -torch.rand(6, 4), torch.rand(6, 4)
ends = torch.tensor([0, 4, 6])  # two sequences
o, state = polyfuse.gated_delta_rule(q, k, v, g, beta, cu_seqlens=ends, output_final_state=True)
print(tuple(o.shape), tuple(state.shape))
"""
PRINTED = "(6, 4, 16) (2, 4, 16, 16)"

SPEC = OpSpec(
    name=NAME,
    version=1,
    summary="The gated delta rule over the rows of packed sequences, with their states.",
    formula=__doc__ or "",
    source=(
        "Yang, Kautz, Hatamizadeh, Gated Delta Networks, arXiv:2412.06464; Yang et al., Parallelizing Linear "
        "Transformers with the Delta Rule, arXiv:2406.06484, for the chunked form; Transformers Qwen3NextGatedDeltaNet"
    ),
    example=(EXAMPLE, PRINTED),
    rows="L",
    independent=True,
    groups=("S",),
    tensors=(
        TensorSpec("q", ("L", "H", "K"), FLOATS, "queries, as a rule normalised; any strides", dtype_var="T"),
        TensorSpec("k", ("L", "H", "K"), FLOATS, "keys, as a rule normalised; any strides", dtype_var="T"),
        TensorSpec("v", ("L", "HV", "V"), FLOATS, "values; any strides", dtype_var="T"),
        TensorSpec("g", ("L", "HV"), ("float32",), "logarithm of the decay, <= 0; -infinity empties the state"),
        TensorSpec("beta", ("L", "HV"), ("float32",), "how much of the state's answer to k is replaced"),
        TensorSpec(
            "initial_state",
            ("S", "HV", "K", "V"),
            ("float32",),
            "the state before each sequence; any strides",
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
            ("slots", "HV", "K", "V"),
            FLOATS,
            "states of sequences, in place of initial_state and final_state; any strides",
            optional=True,
            updated=True,
        ),
        *POOL_ARGUMENTS,
    ),
    attrs=(
        AttrSpec("scale", "float", None, "what o is multiplied by, > 0; None is K ** -0.5"),
        AttrSpec("output_final_state", "bool", False, "return final_state; else it has no sequences"),
    ),
    outputs=(
        OutputSpec("o", ("L", "HV", "V"), "T", "what the state answers to q"),
        OutputSpec("final_state", ("F", "HV", "K", "V"), "float32", "the state after each sequence"),
    ),
    errors=(
        ErrorBound(
            "operands",
            lambda names: names["operand_steps"],
            "one rounding to T of each operand that the formula names: 2^-8 of bfloat16, 2^-11 of float16, nothing of "
            "float32. Errors of d reach o and the state as the chunked form passes them on. In float16 an operand is "
            "rounded to a multiple of 2^-24 at least; a flushed operand counts as one",
            flushes=lambda names: names["operand_flushes"],
        ),
        ErrorBound(
            "sums",
            8,
            "magnitude: the root of the sum of the squares of the products. A sum of 128 products that rounds to "
            "nearest errs by the root of 128 roundings of half of its size; the inverse and its products with the rest "
            "are such sums. It is an error of the operand that the sum becomes",
        ),
        ErrorBound(
            "decays",
            1,
            "relative, of each decay: the sum of |g| over the chunk, each at most 120, as the running sum is rounded; "
            "and 16, for the exponentials of its 64 rows: 2 roundings each, times the root of 64",
        ),
        ErrorBound(
            "o",
            8,
            "the errors of operands, sums, decays and the state before. Magnitude: the root of the sum of the squares "
            "of all products in exp(G) q S and P d: two sums, the scale and the sum of both; a recurrence "
            "rounds the state in each of up to 64 rows, at random. A flushed product counts |k| |d| or |S| times",
            flushes=1,
        ),
        ErrorBound(
            "final_state",
            8,
            "the errors of operands, sums, decays and the state before. Magnitude, at the end of each chunk: the root "
            "of the sum of the squares of exp(G) S and all k d in the state: a recurrence rounds it in each of up to "
            "64 rows, at random. A flushed product counts |k| |d| or |S| times",
            flushes=1,
        ),
        ErrorBound("state_pool", 0, "the errors of final_state, and one rounding to the dtype of the pool"),
    ),
    edge_cases=(
        "Errors of different roundings add up as the root of the sum of their squares, of which 3 times is granted: "
        "that is seven standard deviations. Rows that are all alike, whose roundings are too, may exceed it.",
        "L == 0: empty results, and the initial state (or zeros) as the final one. Empty sequences keep their state.",
        "cu_seqlens is not read back to the host: its entries are taken to be within 0 to L, and not to decrease. Rows "
        "before its first entry and past its last give zero, whatever they hold.",
        "g of -infinity, or below -120, makes the state before it count nothing. It makes no NaN.",
        "beta beyond 1 and vectors longer than 1 are allowed; where the recurrence grows, so does its error.",
        "A NaN in q makes its row NaN, one in v or initial_state its column from there on, one in k, g or beta its "
        "heads from there on. Infinities leave undefined what depends on them. Rows of the same chunk of 64 before a "
        "NaN or infinity in k, v, g or beta are undefined in its heads, and of v in its column: chunks multiply it by "
        "zero. It reaches no other sequence.",
        "An operand beyond the largest number of T leaves undefined what depends on it.",
        "K == 0: o is zero.",
        "Subnormal float32 numbers, inputs and results, may count as zero.",
        "Not differentiable: gradients are refused.",
    ),
    core=(
        "bfloat16-h2-hv4",
        "float32-h2-hv4",
        "float16-h2-hv4",
        "bfloat16-packed-int32-initial_state",
        "float32-packed-int64-initial_state",
        "no_initial_state",
        "rows_64-bfloat16",
        "dims_k128-v128",
        "one_of_three-bfloat16",
        "state_last_two_swapped",
        "scale_2.0-bfloat16",
        "g_resets-bfloat16",
        "sequence_nan-bfloat16",
        "pool-bfloat16-float32",
    ),
    check=_check,
    derive=_derive,
    cost=_cost,
    steps=(
        Step(
            "S begins as a state, or as zero",
            ("initial_state", "state_pool", "state_indices", "has_initial_state", "cu_seqlens"),
        ),
        Step("per row: S = exp(g) * S", ("g",)),
        Step("d = beta * (v - S^T k)", ("k", "v", "beta")),
        Step("S = S + k d^T"),
        Step("o = scale * S^T q", ("q",), ("o",)),
        Step("keep the last S", (), ("final_state", "state_pool")),
    ),
)
