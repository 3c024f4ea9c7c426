"""Conformance of `gdn_in_proj`: cases, fills, and wrong implementations that must be rejected."""

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill
from polyfuse.conformance.mutations import Mutant, changed, common, right, ties_away, truncated
from polyfuse.reference import oracle
from polyfuse.reference._numerics import F64, Array, round_to, to_f64
from polyfuse.spec import FLOATS, dtype_name
from polyfuse.spec.gdn_in_proj import NAME, STRATEGIES

BIASES = ("bias_qkvz", "bias_ba")
TWO, FOUR = ("w_qkvz", "w_ba"), ("w_qkvz", "w_z", "w_ba", "w_a")  # the weights in the order in which merged has them
SMALL = {"...": (5,), "hidden": 64, "N1": 96, "N2": 8}


def cases() -> Iterator[Case]:
    for dtype, strategy in product(FLOATS, STRATEGIES):
        yield _case(f"{dtype}-{strategy}", strategy, SMALL, dtype)
    for strategy in STRATEGIES:
        yield _case(f"bias-{strategy}", strategy, SMALL, present=BIASES)
        for lead in ((0,), (1,), (17,), (2, 3)):
            yield _case(f"lead_{'x'.join(map(str, lead))}-{strategy}", strategy, {**SMALL, "...": lead})
        odd = {"...": (3,), "hidden": 50, "N1": 37, "N2": 5}
        yield _case(f"odd_sizes-{strategy}", strategy, odd, "float32")
        layout = {"x": "row_strided", "w_qkvz": "row_strided", "w_ba": "column_strided"}
        yield _case(f"strided-{strategy}", strategy, SMALL, layout=layout)
        yield _case(f"nan_some-{strategy}", strategy, SMALL, fill={"x": "nan_some"})
    yield Case("one_bias", SMALL, {}, {"T": "float32"}, present=("bias_ba",))
    yield Case("empty_ba", {**SMALL, "N2": 0}, {}, {"T": "float32"})
    yield Case("wide", {"...": (4,), "hidden": 512, "N1": 256, "N2": 64}, {}, {"T": "bfloat16"})
    for strategy in STRATEGIES:
        fill: dict[str, str] = dict.fromkeys(("x", *TWO, *BIASES), "integers")
        yield _case(f"integers-{strategy}", strategy, SMALL, present=BIASES, fill=fill)
    yield Case("wide-float32", {"...": (4,), "hidden": 2048, "N1": 256, "N2": 64}, {}, {"T": "float32"})
    # 180,224 rows: more than 2**31 elements. Only a kernel of our own promises equal rows.
    dims = {"...": (704,), "hidden": 64, "N1": 12288, "N2": 64}
    yield Case("over_2_31", dims, {"strategy": "fused"}, {"T": "bfloat16"}, repeat=256)
    yield from _weights_in_parts()


def _weights_in_parts() -> Iterator[Case]:
    """With w_z, w_a or both, of sizes that share no block of a kernel."""
    four = {**SMALL, "NZ": 40, "NA": 6}
    for dtype, strategy in product(FLOATS, STRATEGIES):
        yield _case(f"four_weights-{dtype}-{strategy}", strategy, four, dtype, weights=FOUR)
    for strategy in STRATEGIES:
        with_z, with_a = ("w_qkvz", "w_z", "w_ba"), ("w_qkvz", "w_ba", "w_a")
        yield _case(f"with_z-{strategy}", strategy, {**SMALL, "NZ": 40}, weights=with_z)
        yield _case(f"with_a-{strategy}", strategy, {**SMALL, "NA": 8}, weights=with_a)
        odd = {"...": (3,), "hidden": 50, "N1": 37, "N2": 5, "NZ": 19, "NA": 1}
        yield _case(f"four_odd-{strategy}", strategy, odd, "float32", weights=FOUR, present=BIASES)
        for lead in ((0,), (2, 9)):
            dims = {**four, "...": lead}
            yield _case(f"four_lead_{'x'.join(map(str, lead))}-{strategy}", strategy, dims, weights=FOUR)
        layout = {"x": "row_strided", "w_z": "column_strided", "w_ba": "row_strided", "w_a": "column_strided"}
        yield _case(f"four_strided-{strategy}", strategy, four, weights=FOUR, layout=layout)
        fill: dict[str, str] = dict.fromkeys(("x", *FOUR, *BIASES), "integers")
        yield _case(f"four_integers-{strategy}", strategy, four, weights=FOUR, present=BIASES, fill=fill)
        yield _case(f"no_hidden-{strategy}", strategy, {**four, "hidden": 0}, weights=FOUR, present=BIASES)
    yield _case("four_one_bias", "auto", four, "float32", weights=FOUR, present=("bias_qkvz",))
    for name in ("N1", "NZ", "N2", "NA"):
        yield _case(f"four_without_{name}", "auto", {**four, name: 0}, "float32", weights=FOUR)
        yield _case(f"four_without_{name}-fused", "fused", {**four, name: 0}, weights=FOUR, present=BIASES)


def _case(
    name: str,
    strategy: str,
    dims: Mapping[str, Any],
    dtype: str = "bfloat16",
    *,
    weights: tuple[str, ...] = TWO,
    present: tuple[str, ...] = (),
    **options: Any,
) -> Case:
    """A case of a strategy on these weights, which are one matrix where the strategy takes no others."""
    widths = {"M1": dims["N1"] + dims.get("NZ", 0), "M2": dims["N2"] + dims.get("NA", 0)}
    return Case(
        name,
        {**dims, **widths},
        {"strategy": strategy},
        {"T": dtype},
        present=(*(w for w in weights if w not in TWO), *present),
        stacked=weights if strategy == "merged" else (),
        **options,
    )


FILLS: dict[str, Fill] = {}


def _tail_dropped(values: dict[str, Any]) -> dict[str, Any]:
    x = values["x"].copy()
    x[..., -x.shape[-1] // 8 :] = 0
    return {"x": x}


def _bias_after_rounding(**values: Any) -> Any:
    both = right(NAME, {**values, "bias_qkvz": None, "bias_ba": None})
    dtype = dtype_name(values["x"].dtype)
    results = []
    for result, bias in zip(both, (values["bias_qkvz"], values["bias_ba"]), strict=True):
        results.append(result if bias is None else round_to(to_f64(result) + to_f64(bias), dtype))
    return tuple(results)


def _operands(values: dict[str, Any]) -> list[tuple[F64, Array | None]]:
    """The whole weight and the bias of each result."""
    found = []
    for names, bias in ((("w_qkvz", "w_z"), "bias_qkvz"), (("w_ba", "w_a"), "bias_ba")):
        parts = [to_f64(values[name]) for name in names if values[name] is not None]
        found.append((np.concatenate(parts), values[bias]))
    return found


def _exchanged(first: str, second: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A change that gives each of two weights for the other, where both are given."""

    def change(values: dict[str, Any]) -> dict[str, Any]:
        return {} if values[second] is None else {first: values[second], second: values[first]}

    return change


def _w_a_dropped(values: dict[str, Any]) -> dict[str, Any]:
    return {} if values["w_a"] is None else {"w_a": np.zeros_like(values["w_a"])}


def _sums_in_bfloat16(**values: Any) -> Any:
    results = []
    for weight, _ in _operands(values):
        total = np.zeros((*values["x"].shape[:-1], len(weight)), np.float32)
        for k in range(0, values["x"].shape[-1], 16):
            part = to_f64(values["x"][..., k : k + 16]) @ weight[:, k : k + 16].T
            total = (total + part).astype(ml_dtypes.bfloat16).astype(np.float32)
        results.append(total.astype(values["x"].dtype))
    return tuple(results)


def _exact(values: dict[str, Any]) -> list[Any]:
    return [exact.value for exact in oracle(NAME).intervals(**values).values()]


def _accumulator_of_22_bits(**values: Any) -> Any:
    """Sums of 16 products enter an accumulator that truncates to 22 bits, two less than float32 has."""
    results = []
    x = to_f64(values["x"])
    for weight, bias in _operands(values):
        total = np.zeros((*x.shape[:-1], len(weight)))
        for k in range(0, x.shape[-1], 16):
            total = truncated(total + x[..., k : k + 16] @ weight[:, k : k + 16].T, 22)
        total = total if bias is None else total + to_f64(bias)
        results.append(round_to(total, dtype_name(values["x"].dtype)))
    return tuple(results)


def _ties_away(**values: Any) -> Any:
    results: list[Array] = [ties_away(value, dtype_name(values["x"].dtype)) for value in _exact(values)]
    return tuple(results)


MUTANTS: dict[str, Mutant] = common(NAME) | {
    "tail_dropped": changed(NAME, _tail_dropped),
    "bias_dropped": changed(NAME, lambda v: {"bias_qkvz": None, "bias_ba": None}),
    "bias_after_rounding": _bias_after_rounding,
    "sums_in_bfloat16": _sums_in_bfloat16,
    "accumulator_of_22_bits": _accumulator_of_22_bits,
    "ties_away": _ties_away,
    "z_before_qkv": changed(NAME, _exchanged("w_qkvz", "w_z")),
    "a_before_b": changed(NAME, _exchanged("w_ba", "w_a")),
    "w_a_dropped": changed(NAME, _w_a_dropped),
}
