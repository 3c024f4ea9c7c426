"""The oracle of `silu_mul_block_quant`; the formula is the docstring of `polyfuse.spec.silu_mul_block_quant`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from polyfuse.reference._numerics import F64, FP32_MAX, Array, Exact, may_flush, round_to, to_f64
from polyfuse.reference._oracle import Error, Oracle
from polyfuse.reference._quantiser import Interval, Quantiser, or_nan, quantise, store
from polyfuse.reference._quantiser import bounds as quantised_bounds
from polyfuse.reference.gdn_post_conv import sigmoid
from polyfuse.spec import FP32_TINY, Capability, dtype_name
from polyfuse.spec.silu_mul_block_quant import SPEC

CAPABILITY = Capability(devices=("cpu",))


def formula(
    x: Array,
    *,
    up: Array | None,
    row_weight: Array | None,
    interleaved: bool,
    alpha: float,
    up_offset: float,
    limit: float | None,
    limit_on: str,
    materialize: bool,
    **quantiser: Any,
) -> tuple[F64, F64]:
    """q [..., Q] and scale [R, G], or the bytes of a packed scale; 0 where nothing is written."""
    gate, factor = gate_and_up(x, up, interleaved, limit, limit_on)
    alpha, up_offset = float(np.float32(alpha)), float(np.float32(up_offset))
    factor = factor + up_offset if up_offset else factor  # -0 + 0 would be +0
    if materialize:
        silu = gate * sigmoid(gate) if alpha == 1 else gate * rounded(sigmoid(rounded(alpha * gate, x)), x)
        factor = rounded(factor, x) if up_offset else factor
        y = rounded(capped(rounded(silu, x), limit, limit_on) * factor, x)
    else:
        y = overflowed(capped(gate * sigmoid(alpha * gate), limit, limit_on) * factor)
    if row_weight is not None:
        y = y * to_f64(row_weight)[..., None]
        y = rounded(y, x) if materialize else overflowed(y)
    by = Quantiser(**quantiser)
    return quantise(y, by)


def gate_and_up(x: Array, up: Array | None, interleaved: bool, limit: float | None, limit_on: str) -> tuple[F64, F64]:
    """Of x, or x and up; clamped to the float32 nearest to the limit."""
    columns = to_f64(x)
    if up is not None:
        gate, factor = columns, to_f64(up)
    elif interleaved:
        gate, factor = columns[..., 0::2], columns[..., 1::2]
    else:
        gate, factor = np.split(columns, 2, axis=-1)
    if limit is not None:
        limit = float(np.float32(limit))
        gate = np.minimum(gate, limit) if limit_on == "input" else gate
        factor = np.clip(factor, -limit, limit)
    return gate, factor


def capped(silu: F64, limit: float | None, limit_on: str) -> F64:
    """silu(gate), at most the limit if that is on it."""
    return np.minimum(silu, np.float64(np.float32(limit))) if limit is not None and limit_on == "silu" else silu


def rounded(value: F64, x: Array) -> F64:
    """`value` rounded to the dtype of x."""
    return to_f64(round_to(value, dtype_name(x.dtype)))


def overflowed(y: F64) -> F64:
    """`y`, infinite beyond float32."""
    return np.where(np.abs(y) > FP32_MAX, np.copysign(np.inf, y), y)


def bounds(exact: Mapping[str, F64], given: Any, error: Error) -> dict[str, Exact]:
    """The error of y, through the largest |y| to scale, and of both to q."""
    y = _activation_interval(given, *error("y"), error("terms")[0])
    if given.row_weight is not None:
        weight = to_f64(given.row_weight)[..., None]
        around_0 = (y.value != 0) & (y.low <= FP32_TINY) & (y.high >= -FP32_TINY)
        either = np.isinf(y.value) & may_flush(weight) | np.isinf(weight) & around_0
        lost = may_flush(weight)
        ends = (np.where(lost, pick(weight, 0), weight) for pick in (np.minimum, np.maximum))
        y = _product(y, Interval(weight, *ends))
        y = _around(y, *error("weighted"))
        y = Interval(*(rounded(end, given.x) if given.materialize else overflowed(end) for end in y))
        y = or_nan(y, either)
    return quantised_bounds(y, given, error)


def _activation_interval(given: Any, relative: float, flush: float, of_terms: float) -> Interval:
    """gate * sigmoid(alpha * gate) * (up + up_offset)."""
    gate, up = gate_and_up(given.x, given.up, given.interleaved, given.limit, given.limit_on)
    alpha, offset = float(np.float32(given.alpha)), float(np.float32(given.up_offset))
    sigma = sigmoid(alpha * gate)
    silu, factor = gate * sigma, up + offset if offset else up
    steps, flushed = _silu_error(gate, alpha * gate, relative, flush)
    # Where the limit is surely below it, the error of silu is none of the result.
    clamped = silu * (1 - steps) > capped(silu, given.limit, given.limit_on)
    steps, flushed = np.where(clamped, relative, steps), np.where(clamped, 0.0, flushed)
    if given.materialize:
        y = _rounded_in_turn(gate, up, given, relative, flush, of_terms)
        lost = (flush > 0) & (may_flush(factor) | may_flush(y.value))  # products with 0, or 0
        low, high = (np.where(lost, pick(end, 0), end) for pick, end in ((np.minimum, y.low), (np.maximum, y.high)))
        y = Interval(y.value, low, high)
    else:
        most = capped(silu, given.limit, given.limit_on)  # an infinite silu that is clamped leaves nothing infinite
        value = overflowed(most * factor)
        error = steps * np.abs(value) + flushed * np.abs(factor) + flush * (1 + np.abs(most))
        error = np.where(np.isfinite(value), error, 0.0)
        y = Interval(value, value - error, value + error)
    # An infinite factor meets one that may count as 0: NaN and infinity are both right.
    either = np.isinf(factor) & (gate != 0) & (np.minimum(sigma, np.abs(silu)) < FP32_TINY)
    return or_nan(y, either | np.isinf(silu) & may_flush(factor))


def _silu_error(gate: F64, inner: F64, relative: float, flush: float) -> tuple[F64, F64]:
    """Of gate * sigmoid(inner): the relative error, and what is lost where the sigmoid or the product is flushed."""
    sigma = sigmoid(inner)
    lost = np.abs(gate) * np.minimum(sigma, flush) + np.minimum(np.abs(gate * sigma), flush)
    return relative * (1 + np.maximum(-inner, 0)), lost


def _rounded_in_turn(gate: F64, up: F64, given: Any, relative: float, flush: float, of_terms: float) -> Interval:
    """The same with materialize: each interval is rounded at both ends."""
    x, alpha, offset = given.x, float(np.float32(given.alpha)), float(np.float32(given.up_offset))

    def stored(interval: Interval) -> Interval:
        return Interval(*(rounded(end, x) for end in interval))

    if alpha == 1:
        silu = gate * sigmoid(gate)
        steps, flushed = _silu_error(gate, gate, relative, flush)
        error = steps * np.abs(silu) + flushed
        error = np.where(np.isfinite(silu), error, 0.0)
        activated = stored(Interval(silu, silu - error, silu + error))
    else:
        inner = stored(_around(Interval(*[alpha * gate] * 3), of_terms, flush))
        ends = []
        for argument, sign in zip(inner, (0, -1, 1), strict=True):
            sigma = sigmoid(argument)
            wider = sigma + sign * (relative * sigma * (1 + np.maximum(-argument, 0)) + np.minimum(sigma, flush))
            ends.append(np.where(np.isfinite(argument), wider, sigma))
        low, high = np.minimum(ends[1], ends[2]), np.maximum(ends[1], ends[2])  # alpha may be negative
        product = _product(stored(Interval(ends[0], low, high)), Interval(gate, gate, gate))
        activated = stored(_around(product, 0.0, flush))
    activated = Interval(*(capped(end, given.limit, given.limit_on) for end in activated))
    factor = Interval(up, up, up)
    if offset:
        factor = stored(_around(Interval(*[up + offset] * 3), of_terms, flush))
    return stored(_product(activated, factor))


def _around(interval: Interval, relative: float, flush: float) -> Interval:
    """The interval with one more rounding, or flush, of its ends."""
    value, low, high = interval
    slack = [relative * np.abs(end) + np.minimum(np.abs(end), flush) for end in (low, high)]
    slack = [np.where(np.isfinite(end), more, 0.0) for end, more in zip((low, high), slack, strict=True)]
    return Interval(value, low - slack[0], high + slack[1])


def _product(a: Interval, b: Interval) -> Interval:
    """Of two intervals, end by end."""
    corners = [one * other for one in a[1:] for other in b[1:]]
    return Interval(a.value * b.value, np.minimum.reduce(corners), np.maximum.reduce(corners))


silu_mul_block_quant = Oracle(SPEC, formula, bounds, store)
