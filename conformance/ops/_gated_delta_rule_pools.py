"""Pools of states of `gated_delta_rule` in conformance: cases, and mistakes with them."""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise, product
from typing import Any

import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill
from polyfuse.conformance.mutations import Mutant, patched, right
from polyfuse.conformance.ops import _pools as pools
from polyfuse.conformance.ops._gated_delta_rule_mutants import in_dtype
from polyfuse.reference import gated_delta_rule as oracle
from polyfuse.reference._numerics import F64, Array, round_to, to_f64
from polyfuse.reference.gdn_conv_prep import slots_of
from polyfuse.spec import FLOATS, INTS
from polyfuse.spec.gated_delta_rule import CHUNK, NAME

# None, none, 3, 65, 64, none, 1 and 66 rows; 2 before the first, 2 past the last. The first two and the sixth leave
# their slots as they are, or clear them; the third has no slot; the second, fifth and eighth have no initial state.
_ENDS = (2, 2, 2, 5, 70, 134, 134, 135, 201)
_SHORT = (0, 0, 3, 4, 6)


def cases() -> Iterator[Case]:
    """Calls with a pool, whose slots that no sequence reads hold NaN."""
    for number, (dtype, pool) in enumerate(product(FLOATS, FLOATS)):
        yield _case(f"{dtype}-{pool}", dtype=dtype, pool=pool, index=INTS[number % 2], dims={"HV": 1})
    # Nothing but decays and the state: in fp32 to the end, whatever the dtype.
    for dtype in FLOATS:
        yield _case(f"state_alone-{dtype}", _SHORT, dtype=dtype, fill={"beta": "zeros", "g": "zeros"})
    for index in INTS:
        yield _case(f"out_of_range-{index}", _SHORT, index=index, fill={"state_indices": "out_of_range"})
    for present in ((), pools.OPTIONS[:1], pools.OPTIONS[1:]):
        yield _case(f"with_{'-'.join(present) or 'nothing'}", _SHORT, present=present)
    for present, fresh in (((), False), (pools.OPTIONS, False), (pools.OPTIONS[1:], True)):
        name = f"one_sequence-{'-'.join(present) or 'nothing'}{'-fresh' if fresh else ''}"
        fill = {"has_initial_state": "zeros"} if fresh else {}
        yield _case(name, (0, 70), present=present, packed=False, fill=fill)
    yield _case("no_slot_named", _SHORT, fill={"state_indices": "none"})
    for index in INTS:
        yield _case(f"no_rows-{index}", (0,) * 9, index=index, pool="bfloat16")
    yield _case("no_rows-one_sequence", (0, 0), packed=False, fill={"has_initial_state": "zeros"})
    yield _case("all_empty", (3,) * 5, rows=5)
    yield _case("single_rows", tuple(range(5)), pool="bfloat16")
    for layout, pool in product(("last_two_swapped", "row_strided", "column_strided"), ("bfloat16", "float32")):
        yield _case(f"{layout}-{pool}", _SHORT, pool=pool, layout={"state_pool": layout})
    for key, value in ((5, 7), (24, 40), (128, 32)):
        yield _case(f"dims_k{key}-v{value}", _SHORT, dims={"K": key, "V": value})
    for fill in ("nan_some", "inf_some", "subnormal", "large"):
        yield _case(f"pool_{fill}", _SHORT, dtype="float32", pool="bfloat16", fill={"state_pool": fill})
    yield _case("decay_resets", _SHORT, fill={"g": "resets"})


def _case(
    name: str,
    ends: tuple[int, ...] = _ENDS,
    rows: int | None = None,
    dtype: str = "bfloat16",
    pool: str = "float32",
    index: str = "int32",
    present: tuple[str, ...] = pools.OPTIONS,
    packed: bool = True,
    dims: Mapping[str, int] | None = None,
    fill: Mapping[str, str] | None = None,
    **options: Any,
) -> Case:
    """A call of sequences with these ends, or of one that is not `packed`; of 2 value heads for 1 key head."""
    sequences = len(ends) - 1
    kept = "read" if present == pools.OPTIONS else "named" if pools.OPTIONS[0] in present else "first"
    sizes = {"L": rows or ends[-1] + (2 if ends[0] else 0), "H": 1, "HV": 2, "K": 8, "V": 4, "N": len(ends)}
    return Case(
        f"pool-{name}",
        sizes | {"S": sequences, "slots": pools.SLOTS} | dict(dims or {}),
        {},
        {"T": dtype, "cu_seqlens": "int32", "state_pool": pool, "state_indices": index},
        {"cu_seqlens": ends} if packed else {},
        as_tensor=("cu_seqlens",) if packed else (),
        present=("state_pool", *present, *(("cu_seqlens",) if packed else ())),
        fill={"q": "unit", "k": "unit", "g": "decay", "beta": "gate"}
        | {"state_indices": "slots", "has_initial_state": "two_of_three", "state_pool": f"nan_but_{kept}_{sequences}"}
        | dict(fill or {}),
        **options,
    )


def _read_as(change: Callable[[F64], F64]) -> Mutant:
    """The op with other states [S, HV, K, V] found in the pool."""

    def make(states_before: Any) -> Any:
        def wrong(*call: Any) -> Any:
            states = states_before(*call)
            return None if states is None else change(states)

        return wrong

    return patched(NAME, oracle, "states_before", make)


def _written_by(change: Callable[[list[int | None], F64], tuple[list[int | None], F64]]) -> Mutant:
    """The op with other slots and states where the pool is written."""
    return patched(
        NAME, oracle, "pool_after", lambda pool_after: lambda pool, *written: pool_after(pool, *change(*written))
    )


def _with_pool(change: Callable[[dict[str, Any], Array, list[tuple[int, int]]], Array]) -> Mutant:
    """The op with its pool changed: `change` gets the arguments, the pool after the call, and the owned slots.

    Each of these comes with its sequence's number.
    """

    def wrong(**values: Any) -> tuple[Array, ...]:
        results = right(NAME, values)
        if values["state_pool"] is None:
            return results
        slots = slots_of(values["q"], values["cu_seqlens"], values["state_pool"], values["state_indices"])
        owned = [(number, slot) for number, slot in enumerate(slots) if slot is not None]
        return *results[:2], change(values, results[2], owned)

    return wrong


def _lengths(values: dict[str, Any]) -> list[int]:
    cu_seqlens = values["cu_seqlens"]
    return [len(values["q"])] if cu_seqlens is None else [end - start for start, end in pairwise(cu_seqlens.tolist())]


def _empty_left_alone(values: dict[str, Any], pool: Array, owned: list[tuple[int, int]]) -> Array:
    """A sequence without rows does not look at has_initial_state."""
    lengths = _lengths(values)
    for number, slot in owned:
        if not lengths[number]:
            pool[slot] = values["state_pool"][slot]
    return pool


def _empty_cleared(values: dict[str, Any], pool: Array, owned: list[tuple[int, int]]) -> Array:
    """A sequence without rows leaves zeros."""
    lengths = _lengths(values)
    for number, slot in owned:
        if not lengths[number]:
            pool[slot] = 0
    return pool


def _through_bfloat16(values: dict[str, Any], pool: Array, owned: list[tuple[int, int]]) -> Array:
    """The states of sequences that have rows are rounded to bfloat16 before they are stored."""
    lengths = _lengths(values)
    for number, slot in owned:
        if lengths[number]:
            narrow = round_to(to_f64(pool[slot]), "bfloat16")
            pool[slot] = round_to(to_f64(narrow), pool.dtype.name)
    return pool


def _without_the_last_chunk(recurrence: Any) -> Any:
    """The state that is kept is the one before the last chunk, where that is not whole."""

    def wrong(parts: oracle.Rows, state: F64) -> tuple[F64, F64]:
        o, _ = recurrence(parts, state)
        return o, recurrence([part[: len(o) // CHUNK * CHUNK] for part in parts], state)[1]

    return wrong


FILLS: dict[str, Fill] = pools.FILLS

MUTANTS: dict[str, Mutant] = pools.mistakes(NAME, oracle) | {
    "pool_of_the_neighbour_read": _read_as(lambda states: np.roll(states, 1, axis=0)),
    "pool_of_the_neighbour_written": _written_by(lambda slots, new: (slots[1:] + slots[:1], new)),
    "pool_holds_the_last_sequence": _written_by(lambda slots, new: (slots, np.broadcast_to(new[-1:], new.shape))),
    "pool_one_chunk_late": patched(NAME, oracle, "recurrence", _without_the_last_chunk),
    "pool_empty_sequence_left_alone": _with_pool(_empty_left_alone),
    "pool_empty_sequence_cleared": _with_pool(_empty_cleared),
    "pool_read_through_bfloat16": _read_as(lambda states: to_f64(round_to(states, "bfloat16"))),
}
MUTANTS |= {
    f"pool_stored_through_bfloat16_in_{dtype}": in_dtype(dtype, _with_pool(_through_bfloat16)) for dtype in FLOATS
}
