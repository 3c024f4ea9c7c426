"""Pools of states in conformance: which slots sequences own, and mistakes that every op with a pool could make."""

from typing import Any

import numpy as np

from polyfuse.conformance.fills import Fill
from polyfuse.conformance.mutations import Mutant, changed, patched
from polyfuse.reference._numerics import F64, Array, to_f64

SLOTS = 11
OPTIONS = ("state_indices", "has_initial_state")
COUNTS = (1, 4, 8)  # of sequences


def named(sequences: int) -> list[int]:
    """The slots of so many sequences, out of order; the third has none."""
    return [-1 if i == 2 else (4 * i + 2) % SLOTS for i in range(sequences)]


def _slots(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    return np.array(named(shape[0]), np.float64)


def _none(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    return np.full(shape, -1.0)


def _out_of_range(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """As `slots`, but every other sequence has a number beside the pool's."""
    slots = _slots(rng, shape, dtype)
    slots[::2] = np.resize([SLOTS, -4, 2**31 - 1, -(2**31)], len(slots[::2]))
    return slots


def _shuffled(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Different even numbers up to twice as many as there are sequences, in any order; the third sequence has none."""
    slots = 2 * rng.permutation(shape[0] + 1)[: shape[0]].astype(np.float64)
    slots[2:3] = -1
    return np.asarray(slots, np.float64)


def _shuffled_beyond(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """As `shuffled`, but every other sequence has a number that no pool has."""
    slots = _shuffled(rng, shape, dtype)
    slots[::2] = np.resize([2**31 - 1, -4, -(2**31)], len(slots[::2]))
    return slots


def _odd_nan(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Normal values, and NaN in the slots with odd numbers, which `shuffled` names none of."""
    values = rng.standard_normal(shape)
    values[1::2] = np.nan
    return values


def _two_of_three(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    return np.arange(shape[0]) % 3 != 1.0


def nan_but(slots: list[int]) -> Fill:
    """Normal values in these slots, and NaN in the others."""

    def fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
        values = rng.standard_normal(shape)
        values[[slot for slot in range(shape[0]) if slot not in slots]] = np.nan
        return values

    return fill


FILLS: dict[str, Fill] = {
    "slots": _slots,
    "none": _none,
    "out_of_range": _out_of_range,
    "two_of_three": _two_of_three,
    "shuffled": _shuffled,
    "shuffled_beyond": _shuffled_beyond,
    "odd_nan": _odd_nan,
}
FILLS |= {f"nan_but_named_{n}": nan_but(named(n)) for n in COUNTS}
FILLS |= {f"nan_but_first_{n}": nan_but(list(range(n))) for n in COUNTS}
# Of those named, the ones that `two_of_three` reads.
FILLS |= {f"nan_but_read_{n}": nan_but([slot for i, slot in enumerate(named(n)) if i % 3 != 1]) for n in COUNTS}


def pool_changed(op: str, oracle: Any, change: Any) -> Mutant:
    """The op with its pool changed: `change(before, after, slots)`, both pools in float64, gives what it then holds."""

    def wrong(pool_after: Any) -> Any:
        return lambda pool, slots, new: change(to_f64(pool), pool_after(pool, slots, new), slots)

    return patched(op, oracle, "pool_after", wrong)


def _others_zeroed(before: F64, after: F64, slots: list[int | None]) -> F64:
    after[[slot for slot in range(len(after)) if slot not in slots]] = 0
    return after


def _none_written(pool_after: Any) -> Any:
    """A sequence without a slot writes to the last one, as a negative index of NumPy does."""

    def wrong(pool: Array, slots: list[int | None], new: F64) -> F64:
        after: F64 = pool_after(pool, [len(pool) - 1 if slot is None else slot for slot in slots], new)
        return after

    return wrong


def _renamed(op: str, change: Any) -> Mutant:
    """The op with other numbers of slots: `change(indices, slots)`."""

    def wrong(values: dict[str, Any]) -> dict[str, Any]:
        indices, pool = values["state_indices"], values["state_pool"]
        return {} if indices is None or pool is None else {"state_indices": change(indices, len(pool))}

    return changed(op, wrong)


def _last_for_none(indices: Array, slots: int) -> Array:
    return np.where((indices < 0) | (indices >= slots), slots - 1, indices).astype(indices.dtype)


def mistakes(op: str, oracle: Any) -> dict[str, Mutant]:
    """Wrong implementations of an op whose oracle calls `pool_after`."""
    return {
        "pool_not_updated": pool_changed(op, oracle, lambda before, after, slots: before),
        "pool_slot_of_another_zeroed": pool_changed(op, oracle, _others_zeroed),
        "pool_written_for_no_slot": patched(op, oracle, "pool_after", _none_written),
        "pool_read_and_written_for_no_slot": _renamed(op, _last_for_none),
        "pool_numbers_clamped": _renamed(op, lambda indices, slots: np.clip(indices, 0, slots - 1)),
        "pool_in_order_of_sequences": _renamed(op, lambda indices, slots: None),
        "has_initial_state_ignored": changed(op, lambda v: {"has_initial_state": None}),
    }
