"""Other valid values for a case: what its arrays may hold when the same call is made again."""

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfuse.conformance.bits import anything
from polyfuse.conformance.case import Case
from polyfuse.conformance.inputs import make_inputs
from polyfuse.reference import Exact, oracle
from polyfuse.reference._numerics import Array
from polyfuse.spec import OpSpec, bind


class Inputs:
    """The arguments of one call of an op, the validated call, and the oracle's interval of each result."""

    def __init__(self, spec: OpSpec, made: dict[str, Any]) -> None:
        self.spec, self.made = spec, made
        self.call = bind(spec, made)

    @cached_property
    def exact(self) -> dict[str, Exact]:
        """The interval of each result, computed when it is asked for."""
        return oracle(self.spec.name).intervals(**self.made)

    @property
    def free(self) -> list[NDArray[np.bool_]]:
        """Of each result, which elements may hold anything."""
        return [anything(self.exact[output.name]) for output in self.call.results]


def other_inputs(spec: OpSpec, case: Case, made: dict[str, Any], seed: int) -> Inputs:
    """The case with other values in every array: those of another seed, and integers in another order.

    Raises `SpecError` if there are none.
    """
    values = make_inputs(spec, case, seed)
    for name, value in values.items():
        if isinstance(value, np.ndarray) and value.size and value.tobytes() == made[name].tobytes():
            values[name] = _reordered(value, spec.boundaries is not None and name == spec.boundaries.name)
    return Inputs(spec, values)


def _reordered(value: Array, boundaries: bool) -> Array:
    """The same elements in another order: of boundaries the lengths between them."""
    if boundaries:
        lengths = np.diff(value)[::-1]
        return np.concatenate([value[:1], value[:1] + np.cumsum(lengths, dtype=value.dtype)])
    out = np.empty_like(value)  # with the strides of value, where it has memory of its own
    out[...] = value[::-1] if value.ndim else value
    return out
