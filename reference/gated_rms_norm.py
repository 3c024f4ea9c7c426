"""The oracle of `gated_rms_norm`; the formula is the docstring of `polyfuse.spec.gated_rms_norm`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from polyfuse.reference._numerics import F64, FP32_MAX, Array, Exact, may_flush, to_f64
from polyfuse.reference._oracle import Error, Oracle
from polyfuse.reference.gdn_post_conv import sigmoid
from polyfuse.reference.silu_mul_block_quant import overflowed
from polyfuse.spec import FP32_TINY, Capability
from polyfuse.spec.gated_rms_norm import SPEC

CAPABILITY = Capability(devices=("cpu",))


def formula(x: Array, gate: Array, weight: Array, *, eps: float, activation: str, weight_offset: float) -> F64:
    """y [..., V]."""
    rows = to_f64(x)
    n = rows * inverse_rms(rows, eps)
    return weighted(n, factor(weight, weight_offset)) * activated(to_f64(gate), activation)


def inverse_rms(x: F64, eps: float) -> F64:
    """1 / sqrt(mean(x * x) + eps) over the last axis, of a sum that is infinite beyond float32."""
    total = (x * x).sum(-1, keepdims=True)
    total = np.where(total > FP32_MAX, np.inf, total)
    return 1 / np.sqrt(total / max(x.shape[-1], 1) + max(eps, FP32_TINY))


def factor(weight: Array, offset: float) -> F64:
    """weight + offset, of the float32 nearest to the offset."""
    return to_f64(weight) + float(np.float32(offset))


def weighted(n: F64, factors: F64) -> F64:
    """The product with the weight, infinite beyond float32."""
    return overflowed(n * factors)


def activated(gate: F64, activation: str) -> F64:
    """silu(gate), or sigmoid(gate)."""
    return gate * sigmoid(gate) if activation == "silu" else sigmoid(gate)


def bounds(exact: Mapping[str, F64], given: Any, error: Error) -> dict[str, Exact]:
    """A relative error of |y|, that of act, and what flushed numbers change."""
    y, x, gate = exact["y"], to_f64(given.x), to_f64(given.gate)
    inverse, factors = inverse_rms(x, given.eps), factor(given.weight, given.weight_offset)
    n = x * inverse
    product, act = weighted(n, factors), activated(gate, given.activation)

    relative, flush = error("act")
    flushed = 2 + np.abs(gate) if given.activation == "silu" else 2
    of_act = relative * np.where(act == 0, 0, np.abs(act) * (1 + np.maximum(-gate, 0))) + flush * flushed
    relative, flush = error("y")
    flushed = (
        1 + np.abs(act) * (1 + np.abs(n) + (1 + inverse) * np.abs(factors)) + np.abs(y) / max(given.eps, FP32_TINY)
    )
    result = Exact.around(y, relative * np.abs(y) + np.abs(product) * of_act + flush * flushed)

    # An infinite factor meets one that may count as 0: NaN and infinity are both right.
    least_act = np.minimum(np.abs(act), sigmoid(gate))
    either = np.isinf(y) & (
        may_flush(x) | may_flush(n) | may_flush(factors) | may_flush(product) | may_flush(least_act)
    )
    return {"y": Exact(np.where(either, np.nan, y), result.low, result.high)}


gated_rms_norm = Oracle(SPEC, formula, bounds)
