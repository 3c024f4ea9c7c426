"""The oracle of `gdn_in_proj`; the formula is the docstring of `polyfuse.spec.gdn_in_proj`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfuse.reference._numerics import Exact, round_to, to_f64
from polyfuse.spec import FP32_ROUNDOFF, Capability, dtype_name
from polyfuse.spec.gdn_in_proj import SPEC

CAPABILITY = Capability(devices=("cpu",))

Array = NDArray[np.generic]


def exact(
    x: Array,
    w_qkvz: Array,
    w_ba: Array,
    *,
    bias_qkvz: Array | None = None,
    bias_ba: Array | None = None,
    strategy: str = "auto",
) -> dict[str, Exact]:
    """The unrounded qkvz and ba with their intervals; the strategy changes nothing."""
    steps = SPEC.bound("qkvz").steps({"hidden": x.shape[-1]})
    return {"qkvz": _linear(x, w_qkvz, bias_qkvz, steps), "ba": _linear(x, w_ba, bias_ba, steps)}


def gdn_in_proj(
    x: Array,
    w_qkvz: Array,
    w_ba: Array,
    *,
    bias_qkvz: Array | None = None,
    bias_ba: Array | None = None,
    strategy: str = "auto",
) -> tuple[Any, Any]:
    """qkvz and ba, each rounded once."""
    results = exact(x, w_qkvz, w_ba, bias_qkvz=bias_qkvz, bias_ba=bias_ba)
    dtype = dtype_name(x.dtype)
    return round_to(results["qkvz"].value, dtype), round_to(results["ba"].value, dtype)


def _linear(x: Array, weight: Array, bias: Array | None, steps: float) -> Exact:
    rows, columns = to_f64(x), to_f64(weight).T
    with np.errstate(invalid="ignore", over="ignore"):
        value, magnitude = rows @ columns, np.abs(rows) @ np.abs(columns)
        if bias is not None:
            value, magnitude = value + to_f64(bias), magnitude + np.abs(to_f64(bias))
        return Exact.around(value, steps * FP32_ROUNDOFF * magnitude)
