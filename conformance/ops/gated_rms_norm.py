"""Conformance of `gated_rms_norm`: cases, fills, and wrong implementations that must be rejected."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill, scaled
from polyfuse.conformance.mutations import Mutant, changed, common, patched, truncated
from polyfuse.reference import gated_rms_norm as oracle
from polyfuse.reference._numerics import F64, FP32_MAX, Array, round_to, to_f64
from polyfuse.spec import FLOATS, FP32_ROUNDOFF, dtype_name
from polyfuse.spec.gated_rms_norm import ACTIVATIONS, NAME

_HEADS = {"...": (5, 3, 2), "V": 16}


def cases() -> Iterator[Case]:
    for dtype, activation, offset in product(FLOATS, ACTIVATIONS, (0.0, 1.0)):
        attrs = {"activation": activation, "weight_offset": offset}
        dtypes = {"T": dtype, "gate": dtype, "weight": dtype}
        yield Case(f"{dtype}-{activation}-offset_{offset}", {"...": (5,), "V": 48}, attrs, dtypes)
    for x, gate, weight in (
        ("bfloat16", "float32", "float32"),
        ("float16", "bfloat16", "float32"),
        ("float32", "float16", "bfloat16"),
    ):
        dtypes = {"T": x, "gate": gate, "weight": weight}
        yield Case(f"dtypes_{x}-{gate}-{weight}", {"...": (5,), "V": 48}, {}, dtypes)
    for lead in ((), (0,), (3, 0), (1,), (67,), (2, 3), (1, 4, 1, 2)):
        yield Case(f"lead_{'x'.join(map(str, lead))}", {"...": lead, "V": 64}, {}, {"T": "bfloat16"})
    for width in (0, 1, 2, 72, 96, 128, 200, 1000):
        yield Case(f"width_{width}", {"...": (9,), "V": width}, {}, {"T": "bfloat16", "gate": "bfloat16"})
    yield from _layouts()
    yield from _values()
    # 550,000 tokens of 32 heads: more than 2**31 elements.
    yield Case("over_2_31", {"...": (550, 32), "V": 128}, {}, {"T": "bfloat16", "gate": "bfloat16"}, repeat=1000)


def _layouts() -> Iterator[Case]:
    for dtype in FLOATS:
        dtypes = {"T": dtype, "gate": dtype}
        yield Case(f"gate_sliced-{dtype}", _HEADS, {}, dtypes, layout={"gate": "sliced"})
    for name, layout in (
        ("x_sliced", {"x": "sliced"}),
        ("both_sliced", {"x": "sliced", "gate": "sliced"}),
        ("gate_column_strided", {"gate": "column_strided"}),
        ("x_column_strided", {"x": "column_strided"}),
        ("gate_first_half", {"x": "row_strided", "gate": "first_half"}),
        ("gate_second_half", {"gate": "second_half"}),
        ("x_one_of_three", {"x": "one_of_three", "weight": "second_half"}),
    ):
        yield Case(name, _HEADS, {}, {"T": "bfloat16"}, layout=layout)
    yield Case("gate_sliced-width_72", {"...": (4, 2, 3), "V": 72}, {}, {"T": "bfloat16"}, layout={"gate": "sliced"})
    yield Case("gate_sliced-one_group", {"...": (4, 3, 1), "V": 32}, layout={"gate": "sliced"})
    # More strides than a batch, a sequence and two dimensions of heads have.
    yield Case("gate_sliced-five_dims", {"...": (2, 2, 2, 2, 2), "V": 8}, layout={"gate": "sliced"})


def _values() -> Iterator[Case]:
    rows = {"...": (11,), "V": 64}
    for fill in ("zeros", "nan_some", "inf_some", "huge", "tiny", "subnormal", "integers", "large"):
        yield Case(f"x_{fill}", rows, fill={"x": fill})
    for activation, fill in product(ACTIVATIONS, ("zeros", "nan_some", "inf_some", "huge", "subnormal", "wide_line")):
        yield Case(f"gate_{fill}-{activation}", rows, {"activation": activation}, fill={"gate": fill})
    for fill in ("zeros", "nan_some", "inf_some", "huge", "subnormal"):
        yield Case(f"weight_{fill}", rows, fill={"weight": fill})
    yield Case("weight_near_minus_offset", rows, {"weight_offset": -1.0}, fill={"weight": "near_one"})
    yield Case("integers", rows, fill={"x": "integers", "weight": "integers"})
    yield Case("eps_large", rows, {"eps": 0.5})
    yield Case("eps_of_small_rows", rows, {"eps": 1e-5}, fill={"x": "around_1e_3"})
    yield Case("eps_below_float32", rows, {"eps": 1e-60}, fill={"x": "zeros"})


def near_one(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Values that differ from 1 by a hundredth or so."""
    return 1 + 0.01 * rng.standard_normal(shape)


FILLS: dict[str, Fill] = {"near_one": near_one, "around_1e_3": scaled(1e-3)}


def inverse_of(rms: Callable[[F64, float], F64]) -> Callable[[Any], Any]:
    """In place of the oracle's inverse root mean square, that of another norm."""

    def make(right: Any) -> Any:
        def inverse(x: F64, eps: float) -> F64:
            with np.errstate(divide="ignore", invalid="ignore"):
                return 1 / rms(x, eps)

        return inverse

    return make


def _mean(x: F64, count: float | None = None) -> F64:
    """The mean square over the last axis, or the sum of squares by another count."""
    return (x * x).sum(-1, keepdims=True) / (max(x.shape[-1], 1) if count is None else count)


def _padded(x: F64) -> int:
    """The number of columns, rounded up to a power of two."""
    return 1 << max(x.shape[-1] - 1, 0).bit_length()


def approximate(right: Any) -> Any:
    """An inverse root that is 24 float32 roundings too large, as an approximate reciprocal root may be."""
    return lambda x, eps: right(x, eps) * (1 + 24 * FP32_ROUNDOFF)


def truncated_sum(right: Any) -> Any:
    """An inverse root of squares that are added one by one and truncated to 23 bits, one less than float32 has."""

    def inverse(x: F64, eps: float) -> F64:
        total = np.zeros(x.shape[:-1])
        for i in range(x.shape[-1]):
            total = truncated(total + x[..., i] * x[..., i], 23)
        total = np.where(total > FP32_MAX, np.inf, total)[..., None]
        return 1 / np.sqrt(total / max(x.shape[-1], 1) + eps)

    return inverse


def naive_sigmoid(right: Any) -> Any:
    """exp(x) / (1 + exp(x)) in float32, which is infinity by infinity far above 0."""

    def sigmoid(x: F64) -> F64:
        with np.errstate(over="ignore", invalid="ignore"):
            e = np.exp(x.astype(np.float32))
            return to_f64(e / (np.float32(1) + e))

    return sigmoid


def coarse_exponential(right: Any) -> Any:
    """A sigmoid whose exponential has an argument rounded to 16 bits, less than float32 has."""
    return lambda x: right(np.where(np.isfinite(x), truncated(x, 16), x))


def gate_before_the_norm(values: dict[str, Any]) -> tuple[Array]:
    """The norm of x * act(gate)."""
    gated = to_f64(values["x"]) * oracle.activated(to_f64(values["gate"]), values["activation"])
    y = gated * oracle.inverse_rms(gated, values["eps"]) * oracle.factor(values["weight"], values["weight_offset"])
    return (round_to(y, dtype_name(values["x"].dtype)),)


def with_intermediates(*rounded: str) -> Mutant:
    """The formula with some of n, the product with the weight and act rounded to the dtype of x."""

    def mutant(**values: Any) -> tuple[Array]:
        x, dtype = to_f64(values["x"]), dtype_name(values["x"].dtype)

        def stored(name: str, value: F64) -> F64:
            return to_f64(round_to(value, dtype)) if name in rounded else value

        with np.errstate(all="ignore"):
            n = stored("n", x * oracle.inverse_rms(x, values["eps"]))
            product = stored("product", n * oracle.factor(values["weight"], values["weight_offset"]))
            act = stored("act", oracle.activated(to_f64(values["gate"]), values["activation"]))
            return (round_to(product * act, dtype),)

    return mutant


def neighbours(values: dict[str, Any]) -> dict[str, Any]:
    """Each row with the gate of the row before it."""
    gate = values["gate"]
    rows = gate.reshape(-1, max(gate.shape[-1], 1))
    return {"gate": np.roll(rows, 1, axis=0).reshape(gate.shape)}


def read_as_if(strides: Callable[[Array], tuple[int, ...]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The gate read from its first element on with other strides, in bytes."""

    def change(values: dict[str, Any]) -> dict[str, Any]:
        gate = values["gate"]
        return {"gate": np.lib.stride_tricks.as_strided(gate, gate.shape, strides(gate))}

    return change


def _as_contiguous(gate: Array) -> tuple[int, ...]:
    return np.empty_like(gate, order="C", subok=False).strides


def _with_one_row_stride(gate: Array) -> tuple[int, ...]:
    """Rows, counted through, one stride apart: that of the last dimension of rows."""
    if gate.ndim < 2:
        return gate.strides
    counts = [int(np.prod(gate.shape[i + 1 : -1])) for i in range(gate.ndim - 1)]
    least = min(gate.strides[:-1])  # no further than the gate itself reaches
    return (*(count * least for count in counts), gate.strides[-1])


def without_nan(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """NaN read as 0."""
    return lambda values: {
        name: np.where(np.isnan(values[name]), 0, values[name]).astype(values[name].dtype) for name in names
    }


def _other(activation: str) -> str:
    return ACTIVATIONS[1 - ACTIVATIONS.index(activation)]


MUTANTS: dict[str, Mutant] = common(NAME) | {
    "eps_outside_the_root": patched(NAME, oracle, "inverse_rms", inverse_of(lambda x, eps: np.sqrt(_mean(x)) + eps)),
    "eps_as_a_floor": patched(
        NAME, oracle, "inverse_rms", inverse_of(lambda x, eps: np.sqrt(np.maximum(_mean(x), eps)))
    ),
    "eps_squared": changed(NAME, lambda v: {"eps": v["eps"] ** 2}),
    "sum_for_mean": patched(NAME, oracle, "inverse_rms", inverse_of(lambda x, eps: np.sqrt(_mean(x, 1) + eps))),
    "mean_of_padded_columns": patched(
        NAME, oracle, "inverse_rms", inverse_of(lambda x, eps: np.sqrt(_mean(x, _padded(x)) + eps))
    ),
    "mean_of_one_column_less": patched(
        NAME, oracle, "inverse_rms", inverse_of(lambda x, eps: np.sqrt(_mean(x, x.shape[-1] - 1) + eps))
    ),
    "deviation_for_root_mean_square": patched(
        NAME, oracle, "inverse_rms", inverse_of(lambda x, eps: np.sqrt(x.var(-1, keepdims=True) + eps))
    ),
    "approximate_root": patched(NAME, oracle, "inverse_rms", approximate),
    "truncated_sum_of_squares": patched(NAME, oracle, "inverse_rms", truncated_sum),
    "weight_dropped": changed(NAME, lambda v: {"weight": np.ones_like(v["weight"])}),
    "weight_offset_dropped": changed(NAME, lambda v: {"weight_offset": 0.0}),
    "weight_offset_always": changed(NAME, lambda v: {"weight_offset": 1.0}),
    "gate_without_activation": patched(NAME, oracle, "activated", lambda right: lambda gate, activation: gate),
    "other_activation": changed(NAME, lambda v: {"activation": _other(v["activation"])}),
    "silu_whatever_is_asked": changed(NAME, lambda v: {"activation": "silu"}),
    "sigmoid_whatever_is_asked": changed(NAME, lambda v: {"activation": "sigmoid"}),
    "naive_sigmoid": patched(NAME, oracle, "sigmoid", naive_sigmoid),
    "coarse_exponential": patched(NAME, oracle, "sigmoid", coarse_exponential),
    "gate_before_the_norm": lambda **values: gate_before_the_norm(values),
    "x_and_gate_swapped": changed(NAME, lambda v: {"x": v["gate"].astype(v["x"].dtype), "gate": v["x"]}),
    "normalised_rounded": with_intermediates("n"),
    "product_rounded": with_intermediates("product"),
    "rounded_as_in_transformers": with_intermediates("n", "product"),
    "activation_rounded": with_intermediates("act"),
    "gate_of_the_neighbour": changed(NAME, neighbours),
    "gate_read_as_contiguous": changed(NAME, read_as_if(_as_contiguous)),
    "gate_read_with_one_row_stride": changed(NAME, read_as_if(_with_one_row_stride)),
    "nan_of_x_swallowed": changed(NAME, without_nan("x")),
    "nan_of_gate_swallowed": changed(NAME, without_nan("gate")),
}
