"""The oracle of `block_quant`; the formula is the docstring of `polyfuse.spec.block_quant`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from polyfuse.reference._numerics import F64, Array, Exact, to_f64
from polyfuse.reference._oracle import Error, Oracle
from polyfuse.reference._quantiser import Interval, Quantiser, quantise, store
from polyfuse.reference._quantiser import bounds as quantised_bounds
from polyfuse.spec import FP32_TINY, Capability
from polyfuse.spec.block_quant import SPEC

CAPABILITY = Capability(devices=("cpu",))


def formula(
    x: Array,
    **quantiser: Any,
) -> tuple[F64, F64]:
    """q [..., Q] and scale [R, G], or the bytes of a packed scale; 0 where nothing is written."""
    by = Quantiser(**quantiser)
    return quantise(to_f64(x), by)


def bounds(exact: Mapping[str, F64], given: Any, error: Error) -> dict[str, Exact]:
    """x is known exactly, but where it may be flushed."""
    x = to_f64(given.x)
    relative, flush = error("y")
    slack = np.where((x != 0) & (np.abs(x) < FP32_TINY), flush, 0.0) + relative * np.where(np.isfinite(x), np.abs(x), 0)
    return quantised_bounds(Interval(x, x - slack, x + slack), given, error)


block_quant = Oracle(SPEC, formula, bounds, store)
