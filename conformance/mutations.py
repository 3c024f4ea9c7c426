"""How wrong implementations are made of the oracle: each makes one mistake that a kernel author could make."""

from collections.abc import Callable
from typing import Any

import numpy as np

from polyfuse.reference import oracle
from polyfuse.reference._numerics import F64, Array, numpy_dtype, round_to, to_f64
from polyfuse.spec import OPS, bind

Mutant = Callable[..., Any]


def right(op: str, values: dict[str, Any]) -> tuple[Any, ...]:
    """The oracle's results, as fresh arrays."""
    result = oracle(op)(**values)
    return tuple(r.copy() for r in result) if isinstance(result, tuple) else (result,)


def changed(op: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Mutant:
    """The op on other arguments: `change` takes all of them and returns those that differ."""
    return lambda **values: right(op, {**values, **change(values)})


def returned(op: str, change: Callable[..., tuple[Any, ...]]) -> Mutant:
    """The op with its results changed."""
    return lambda **values: change(*right(op, values))


def patched(op: str, place: Any, name: str, make: Callable[[Any], Any]) -> Mutant:
    """The op with another function in place of one that its oracle calls: `make` turns the right one into it."""

    def mutant(**values: Any) -> Any:
        original = getattr(place, name)
        setattr(place, name, make(original))
        try:
            return right(op, values)
        finally:
            setattr(place, name, original)

    return mutant


def common(op: str) -> dict[str, Mutant]:
    """The mistakes that any op could make."""
    return {
        "zeros": returned(op, _zeros),
        "constant": returned(op, _constant),
        "last_row_dropped": returned(op, _last_row_dropped),
        "one_precision_lower": lambda **values: _one_precision_lower(op, values),
    }


def _zeros(*results: Array) -> tuple[Array, ...]:
    return tuple(np.zeros_like(r) for r in results)


def _constant(*results: Array) -> tuple[Array, ...]:
    return tuple(np.full_like(r, r.reshape(-1)[0] if r.size else 0) for r in results)


def _last_row_dropped(*results: Array) -> tuple[Array, ...]:
    for r in results:
        r[-1:] = 0
    return results


def _one_precision_lower(op: str, values: dict[str, Any]) -> tuple[Array, ...]:
    """Every floating result passes through the next narrower dtype."""
    narrower = {"float32": "float16", "float16": "bfloat16", "bfloat16": "float8_e5m2"}
    exact = oracle(op).intervals(**values)
    results = list(right(op, values))
    for i, output in enumerate(bind(OPS[op], values).results):
        if output.dtype in narrower and not exact[output.name].parts:
            low = numpy_dtype(narrower[output.dtype])
            with np.errstate(over="ignore", invalid="ignore"):
                value = exact[output.name].value.astype(np.float32).astype(low)
            results[i] = round_to(to_f64(value), output.dtype)
    return tuple(results)


def ties_away(value: F64, dtype: str) -> Array:
    """`value` rounded to `dtype` with ties away from zero, in place of ties to even."""
    even = to_f64(round_to(value, dtype))
    beyond = to_f64(round_to(np.nextafter(value, np.copysign(np.inf, value)), dtype))
    tie = np.isfinite(beyond) & (np.abs(beyond - value) == np.abs(value - even))
    return round_to(np.where(tie, beyond, even), dtype)


def truncated(value: F64, bits: int) -> F64:
    """`value` cut off after a significand of so many bits."""
    mantissa, exponent = np.frexp(value)
    return np.ldexp(np.trunc(np.ldexp(mantissa, bits)), exponent - bits)
