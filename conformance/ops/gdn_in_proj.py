"""Conformance of `gdn_in_proj`: cases, fills, and wrong implementations that must be rejected."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill
from polyfuse.conformance.mutations import Mutant, changed, common, right, ties_away, truncated
from polyfuse.reference import oracle
from polyfuse.reference._numerics import Array, round_to, to_f64
from polyfuse.spec import FLOATS, dtype_name
from polyfuse.spec.gdn_in_proj import NAME, STRATEGIES


def cases() -> Iterator[Case]:
    small = {"...": (5,), "hidden": 64, "N1": 96, "N2": 8}
    for dtype, strategy in product(FLOATS, STRATEGIES):
        yield Case(f"{dtype}-{strategy}", small, {"strategy": strategy}, {"T": dtype})
    for strategy in STRATEGIES:
        attrs, both = {"strategy": strategy}, ("bias_qkvz", "bias_ba")
        yield Case(f"bias-{strategy}", small, attrs, {"T": "bfloat16"}, present=both)
        for lead in ((0,), (1,), (17,), (2, 3)):
            dims = {**small, "...": lead}
            yield Case(f"lead_{'x'.join(map(str, lead))}-{strategy}", dims, attrs, {"T": "bfloat16"})
        odd = {"...": (3,), "hidden": 50, "N1": 37, "N2": 5}
        yield Case(f"odd_sizes-{strategy}", odd, attrs, {"T": "float32"})
        layout = {"x": "row_strided", "w_qkvz": "row_strided", "w_ba": "column_strided"}
        yield Case(f"strided-{strategy}", small, attrs, {"T": "bfloat16"}, layout=layout)
        yield Case(f"nan_some-{strategy}", small, attrs, {"T": "bfloat16"}, fill={"x": "nan_some"})
    yield Case("one_bias", small, {}, {"T": "float32"}, present=("bias_ba",))
    yield Case("empty_ba", {**small, "N2": 0}, {}, {"T": "float32"})
    yield Case("wide", {"...": (4,), "hidden": 512, "N1": 256, "N2": 64}, {}, {"T": "bfloat16"})
    for strategy in STRATEGIES:
        fill: dict[str, str] = dict.fromkeys(("x", "w_qkvz", "w_ba", "bias_qkvz", "bias_ba"), "integers")
        both = ("bias_qkvz", "bias_ba")
        yield Case(f"integers-{strategy}", small, {"strategy": strategy}, {"T": "bfloat16"}, present=both, fill=fill)
    yield Case("wide-float32", {"...": (4,), "hidden": 2048, "N1": 256, "N2": 64}, {}, {"T": "float32"})
    # 180,224 rows: more than 2**31 elements. Only a kernel of our own promises equal rows.
    dims = {"...": (704,), "hidden": 64, "N1": 12288, "N2": 64}
    yield Case("over_2_31", dims, {"strategy": "fused"}, {"T": "bfloat16"}, repeat=256)


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


def _sums_in_bfloat16(**values: Any) -> Any:
    results = []
    for name in ("w_qkvz", "w_ba"):
        total = np.zeros((*values["x"].shape[:-1], len(values[name])), np.float32)
        for k in range(0, values["x"].shape[-1], 16):
            part = to_f64(values["x"][..., k : k + 16]) @ to_f64(values[name][:, k : k + 16]).T
            total = (total + part).astype(ml_dtypes.bfloat16).astype(np.float32)
        results.append(total.astype(values["x"].dtype))
    return tuple(results)


def _exact(values: dict[str, Any]) -> list[Any]:
    return [exact.value for exact in oracle(NAME).intervals(**values).values()]


def _accumulator_of_22_bits(**values: Any) -> Any:
    """Sums of 16 products enter an accumulator that truncates to 22 bits, two less than float32 has."""
    results = []
    for name, bias in (("w_qkvz", "bias_qkvz"), ("w_ba", "bias_ba")):
        x, weight = to_f64(values["x"]), to_f64(values[name])
        total = np.zeros((*x.shape[:-1], len(weight)))
        for k in range(0, x.shape[-1], 16):
            total = truncated(total + x[..., k : k + 16] @ weight[:, k : k + 16].T, 22)
        total = total if values[bias] is None else total + to_f64(values[bias])
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
}
