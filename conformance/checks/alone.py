"""A row by itself: the rows beside it change nothing, bit for bit, where the spec promises that."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from polyfuse.conformance.attempt import Attempt
from polyfuse.dispatch import family_of, to_numpy

PROVES = "A row's result is the same bits alone, among few and among many rows, where the spec promises it."

MANY = 1030  # rows: past the blocks of 1024 that kernels like


def check(attempt: Attempt) -> Iterator[str]:
    """Which row's result depends on the others."""
    op = attempt.call.op
    rows = _row_arguments(attempt)
    if not op.row_wise or not rows or attempt.case.repeat > 1 or attempt.family == "jax":
        return  # XLA compiles each number of rows by itself, and promises nothing of their bits
    count = len(attempt.made[rows[0]])
    slots = bool(attempt.call.updated)
    if slots and attempt.made["state_indices"] is None:
        return  # a row's number is that of its slot
    whole = [to_numpy(x) for x in attempt.outputs]
    choices = {f"row {i} alone": np.array([i]) for i in sorted({0, count // 2, count - 1}) if count > 1}
    if count > 2:
        choices["the rows in reverse"] = np.arange(count)[::-1]
    most = 40 if attempt.device in attempt.capability.interpreted else MANY
    if 0 < count < most and not slots:  # no two rows share a slot
        choices[f"the rows among {most}"] = np.arange(most) % count
    for name, picked in choices.items():
        arrays = attempt.place(_picked(attempt.made, rows, picked))
        outputs = [to_numpy(x) for x in attempt.run(arrays)]
        for want, one, other in zip(attempt.call.outputs, whole, outputs, strict=False):
            if one.shape[:1] != (count,):
                continue  # it does not lie row by row
            if one[picked].tobytes() != other.tobytes():
                at = next(i for i in range(len(picked)) if one[picked[i]].tobytes() != other[i].tobytes())
                yield f"{want.name}: {name}: row {int(picked[at])} differs in bits from the whole call"
                break


def _row_arguments(attempt: Attempt) -> list[str]:
    """The arrays whose first dimension are the rows; none where integers that are not say which rows count."""
    rows = attempt.call.op.rows
    if attempt.call.dims.get(rows) == ():
        return []
    arrays = [t for t in attempt.call.op.tensors if isinstance(attempt.made[t.name], np.ndarray) and not t.updated]
    found = [t.name for t in arrays if t.shape[:1] == (rows,)]
    return [] if any(attempt.made[t.name].dtype.kind == "i" and t.name not in found for t in arrays) else found


def _picked(made: Mapping[str, Any], rows: list[str], picked: Any) -> dict[str, Any]:
    """The arguments of some rows, laid out like the whole ones as far as rows go."""
    return {name: _rows_of(x, picked) if name in rows else x for name, x in made.items()}


def _rows_of(x: Any, picked: Any) -> Any:
    if family_of(x) != "numpy":
        return x
    order = np.argsort([-step for step in x.strides], kind="stable")
    if x.ndim and order[0] != 0:  # rows do not lie outermost: keep them innermost
        return np.asfortranarray(x[picked])
    return np.ascontiguousarray(x[picked])
