"""Is a peer right? Its results are held against the oracle's intervals before any time of it counts.

The oracle takes the first rows of a large call: the results of these are the same whatever comes behind them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from polyfuse.conformance import compare
from polyfuse.conformance.bits import anything
from polyfuse.dispatch import to_numpy
from polyfuse.reference import oracle
from polyfuse.reference._numerics import Exact, to_f64
from polyfuse.spec import OPS, Call, bind

ROWS = 256  # a multiple of the 128 rows in a block of swizzled scales
EXPERTS = 8  # of a call whose rows belong to experts
TIED = ("cu_seqlens", "state_indices", "num_accepted")  # these name rows or slots, which must all be there


@dataclass(frozen=True)
class Verdict:
    """What a check found: `right`, `differs` by no more than the peer states, or `wrong`; `note` says by how much."""

    status: str
    note: str = ""


class Truth:
    """What the results of one call must be."""

    def __init__(self, op: str, values: Mapping[str, Any]) -> None:
        self.op, self.whole = op, bind(OPS[op], values)
        self.values = first_rows(self.whole, values)
        self.call = bind(OPS[op], self.values)
        self.cut = any(self.values[name] is not value for name, value in values.items())

    @cached_property
    def exact(self) -> Mapping[str, Exact]:
        """The oracle's intervals."""
        return oracle(self.op).intervals(**self.values)

    def judge(self, results: Sequence[Any], tolerance: Mapping[str, float], reason: str = "") -> Verdict:
        """Hold a call's results, updated arguments behind them, against the intervals.

        `tolerance` says of some results what share of the largest exact value the largest error may be.
        """
        wants = self.call.results
        if len(results) != len(wants):
            return Verdict("wrong", f"expected {len(wants)} results, got {len(results)}")
        inexact: list[str] = []
        for want, whole, got in zip(wants, self.whole.results, results, strict=True):
            if tuple(got.shape) != tuple(whole.shape):
                return Verdict("wrong", f"{want.name}: expected shape {list(whole.shape)}, got {list(got.shape)}")
            if self.cut and want.shape == whole.shape:
                continue  # it depends on the rows that were left out
            part = np.ascontiguousarray(to_numpy(got[tuple(slice(size) for size in want.shape)]))
            problem = compare(want.name, part, self.exact[want.name], want.dtype)
            if problem is None:
                continue
            if want.name not in tolerance:
                return Verdict("wrong", problem)
            error = largest_error(part, self.exact[want.name])
            if not error <= tolerance[want.name]:
                return Verdict("wrong", f"{problem}; the largest error is {error:.1e} of the largest value")
            inexact.append(f"{want.name} {error:.1e}")
        if inexact:
            return Verdict("differs", f"by {', '.join(inexact)} of the largest value: {reason}")
        return Verdict("right")


def first_rows(call: Call, values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the first rows of a call, or of the first rows of its first experts; slot i is row i's."""
    op = call.op
    if any(values.get(name) is not None for name in TIED):
        return dict(values)
    masked = values.get("num_rows") is not None
    limits = (EXPERTS, ROWS) if masked else (ROWS,)
    found = dict(values)
    for tensor in op.tensors:
        value = values[tensor.name]
        if not isinstance(value, np.ndarray):
            continue
        if tensor.shape[:1] == (op.rows,) or tensor.updated or (masked and tensor.name == "num_rows"):
            sizes = [min(size, limit) for size, limit in zip(value.shape, limits, strict=False)]
            if sizes != list(value.shape[: len(sizes)]):
                found[tensor.name] = value[tuple(map(slice, sizes))]
    return found


def largest_error(got: Any, exact: Exact) -> float:
    """The largest distance from the exact values as a share of the largest of them; infinite beside NaN."""
    with np.errstate(invalid="ignore"):
        distance, value = np.abs(to_f64(got) - exact.value), np.abs(exact.value)
    counted = ~anything(exact)
    if not counted.any():
        return 0.0
    largest = float(np.max(value[counted]))
    error = float(np.max(distance[counted])) / largest if largest else np.inf
    return np.inf if np.isnan(error) else error
