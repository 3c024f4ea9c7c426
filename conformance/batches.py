"""Other batches of a call's rows, sequences or images: alone, in another order, among many."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfuse.conformance.case import Case
from polyfuse.conformance.layouts import LAYOUTS
from polyfuse.reference._numerics import Array
from polyfuse.spec import Call, bind

SLOTS = "state_indices"

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Arguments of a call whose results are parts of those of the whole one.

    Of each result, `same` names elements of the first dimension here, and those of the whole call that they must equal.
    """

    name: str
    values: Mapping[str, Any]
    same: Mapping[str, tuple[Places, Places]]


def batches(case: Case, made: Mapping[str, Any], call: Call, many: int) -> Iterator[Batch]:
    """The batches of a call; the largest has about `many` rows, sequences or images."""
    tensors = {tensor.name: tensor for tensor in call.op.tensors}
    packed = call.op.boundaries
    if packed and packed.boundaries and packed.boundaries.starts:
        given = made[packed.name] is not None
        found = _of_sequences(made, call, many, packed.name) if given else _of_one_sequence(made, call, many)
    elif "grid_thw" in tensors:
        found = _of_images(made, call, many)
    else:
        found = _of_rows(made, call, many)
    for batch in found:
        yield Batch(batch.name, {name: _laid_out(case, name, x) for name, x in batch.values.items()}, batch.same)


def _laid_out(case: Case, name: str, value: Any) -> Any:
    return LAYOUTS[case.layout.get(name, "contiguous")](value) if isinstance(value, np.ndarray) else value


def _picks(count: int, many: int, what: str) -> Iterator[tuple[str, Places]]:
    """Numbers of rows: one alone, all in reverse, all of them many times over."""
    for i in sorted({0, count // 2, count - 1}):
        if count > 1:
            yield f"{what} {i} alone", np.array([i])
    if count > 2:
        yield f"the {what}s in reverse", np.arange(count)[::-1]
    if 0 < count < many:
        yield f"{many} {what}s", np.arange(many) % count


def _of_rows(made: Mapping[str, Any], call: Call, many: int) -> Iterator[Batch]:
    op = call.op
    beside = (op.rows, *op.groups)
    growing = [
        t.name for t in op.tensors if t.shape[:1] and t.shape[0] in beside and isinstance(made[t.name], np.ndarray)
    ]
    first = made[op.tensors[0].name]
    if not first.size or (op.rows == "..." and not call.dims["..."]):
        return
    ends = op.boundaries
    if ends and ends.boundaries and made[ends.name] is not None:
        by_group = [t.name for t in op.tensors if t.shape[:1] and t.shape[0] in op.groups and t.name != ends.name]
        if made.get("fill") is not None or any(made[name] is not None for name in by_group):
            return  # it is of rows of no group, or an argument is of groups: rows stand alone here
        alone = {a.name: a.default for a in op.attrs if a.name == ends.boundaries.alignment}
        made = {**made, ends.name: None, **alone}
        growing.remove(ends.name)
    one = bind(op, {**made, **{argument: made[argument][:1] for argument in growing}})
    by_row = [output.name for output in one.outputs if output.shape[0] == 1]
    for name, picked in _picks(len(first), many, "row"):
        values = dict(made)
        for argument in growing:
            values[argument] = made[argument][picked]
        same = {output: (np.arange(len(picked)), picked) for output in by_row}
        if call.updated:
            same |= _with_slots(made, values, call, picked)
        yield Batch(name, values, same)


def _with_slots(
    made: Mapping[str, Any], values: dict[str, Any], call: Call, picked: Places
) -> dict[str, tuple[Places, Places]]:
    """Give each row, or sequence, that is picked slots of its own in the pools, which hold what its slots held."""
    indices = made.get(SLOTS)
    old = picked if indices is None else indices[picked].astype(np.int64)
    flat = old.reshape(-1)
    same = {}
    for pool in call.updated:
        states = made[pool.name]
        owned = (flat >= 0) & (flat < len(states))
        held = np.zeros((max(len(flat), 1), *states.shape[1:]), states.dtype)
        held[: len(flat)][owned] = states[flat[owned]]
        values[pool.name] = held
        same[pool.name] = np.flatnonzero(owned), flat[owned]
        if indices is not None:
            values[SLOTS] = np.where(owned, np.arange(len(flat)), -1).reshape(old.shape).astype(indices.dtype)
    return same


def _of_sequences(made: Mapping[str, Any], call: Call, many: int, boundaries: str) -> Iterator[Batch]:
    """Packed sequences: some of them, with nothing before the first and past the last."""
    op, ends = call.op, made[boundaries].astype(np.int64)
    growing = [t.name for t in op.tensors if t.shape[0] == op.rows and isinstance(made[t.name], np.ndarray)]
    states = [t.name for t in op.tensors if t.shape[0] in op.groups and isinstance(made[t.name], np.ndarray)]
    if len(ends) < 2 or not all(made[name].size for name in growing):
        return
    count, total = len(ends) - 1, int(ends[-1] - ends[0])
    for name, picked in _picks(count, min(many, 4 * many * count // max(total, 1)), "sequence"):
        rows = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in picked]).astype(np.int64)
        if not len(rows):
            continue
        values = dict(made)
        values |= {argument: made[argument][rows] for argument in growing}
        values |= {argument: made[argument][picked] for argument in states}
        lengths = np.concatenate([[0], np.cumsum(np.diff(ends)[picked])])
        values[boundaries] = lengths.astype(made[boundaries].dtype)
        same = {}
        for output, declared in zip(call.outputs, op.outputs, strict=True):
            if declared.shape[0] == op.rows:
                same[output.name] = np.arange(len(rows)), rows
            elif output.shape[0] == len(ends) - 1:
                same[output.name] = np.arange(len(picked)), picked
        if call.updated:
            same |= _with_slots(made, values, call, picked)
        yield Batch(name, values, same)


def _of_one_sequence(made: Mapping[str, Any], call: Call, many: int) -> Iterator[Batch]:
    """Rows that only look back: the first of them alone, and with more rows behind them."""
    op = call.op
    growing = [t.name for t in op.tensors if t.shape[0] == op.rows and isinstance(made[t.name], np.ndarray)]
    count = len(made[growing[0]])
    for name, picked in (
        ("the first half of the rows", np.arange(-(-count // 2))),
        (f"more rows behind them, {many} in all", np.arange(max(many, count)) % max(count, 1)),
    ):
        if count and 0 < len(picked) != count:
            values = {**made, **{argument: made[argument][picked] for argument in growing}}
            least = np.arange(min(len(picked), count))
            yield Batch(
                name,
                values,
                {
                    output.name: (least, least)
                    for output, declared in zip(call.outputs, op.outputs, strict=True)
                    if declared.shape[0] == op.rows
                },
            )


def _of_images(made: Mapping[str, Any], call: Call, many: int) -> Iterator[Batch]:
    """Images of one batch in others; the rows past the last image are left away."""
    grid = np.array(made["grid_thw"], np.int64)
    sizes = grid.prod(1)
    merge = call.attrs["merge_size"]
    if (grid < 0).any() or (grid[:, 1:] % merge).any() or ((grid == 0).any(1) & grid.any(1)).any():
        return  # a grid that is not valid makes everything NaN
    if made["out_rows"] is not None and sizes.sum() > made["out_rows"]:
        return
    used = np.flatnonzero(sizes)
    starts = np.cumsum(sizes) - sizes
    for name, numbers in _picks(len(used), many, "image"):
        picked = used[numbers]
        rows = np.concatenate([np.arange(starts[i], starts[i] + sizes[i]) for i in picked])
        if len(rows) > 20 * sizes.sum():
            continue
        values = dict(made)
        values["grid_thw"] = _like(made["grid_thw"], grid[picked])
        values["out_rows"] = None if made["out_rows"] is None else len(rows)
        if made["base"] is not None:
            values["base"] = made["base"][rows]
        yield Batch(name, values, {"out": (np.arange(len(rows)), rows)})


def _like(before: Any, rows: Array) -> Sequence[Any] | Array:
    if isinstance(before, np.ndarray):
        return rows.astype(before.dtype)
    return tuple(tuple(int(n) for n in row) for row in rows)
