"""Wrong implementations of `gated_delta_rule`, and the chunked form that some of them are made of."""

from collections.abc import Callable
from typing import Any

import numpy as np

from polyfuse.conformance.mutations import Mutant, changed, common, patched
from polyfuse.reference import gated_delta_rule as oracle
from polyfuse.reference._numerics import F64, Array
from polyfuse.spec import FLOATS, dtype_name
from polyfuse.spec.gated_delta_rule import CHUNK, NAME


def chunked(rounded: Callable[[F64], F64], stored: Callable[[F64], F64] = lambda state: state) -> Any:
    """What makes of a recurrence the chunked form of the spec, whose operands are rounded.

    `stored` is what becomes of the state between chunks.
    """

    def of_sequence(parts: oracle.Rows, state: F64) -> tuple[F64, F64]:
        o = np.zeros(parts[2].shape)
        for start in range(0, len(o), CHUNK):
            rows = slice(start, start + CHUNK)
            q, k, v, g, beta = (np.swapaxes(part[rows], 0, 1) for part in parts)  # [HV, rows, ...]
            total = np.cumsum(np.maximum(g, oracle.RESET), axis=1)
            decay = np.tril(np.exp(np.minimum(total[:, :, None] - total[:, None], 0)))
            mixed = np.tril(beta[:, :, None] * decay * (k @ k.swapaxes(1, 2)), -1)
            whole: Any = np.linalg.inv(np.eye(mixed.shape[1]) + mixed)
            inverse = rounded(whole)
            u = rounded(inverse @ rounded(beta[:, :, None] * v))
            w = rounded(inverse @ rounded((beta * np.exp(total))[:, :, None] * k))
            d = rounded(u - w @ rounded(state))
            p = rounded(decay * (q @ k.swapaxes(1, 2)))
            o[rows] = np.swapaxes(rounded(np.exp(total)[:, :, None] * q) @ rounded(state) + p @ d, 0, 1)
            kept = rounded(decay[:, -1, :, None] * k).swapaxes(1, 2)
            state = stored(np.exp(total[:, -1])[:, None, None] * state + kept @ d)
        return o, state

    return lambda recurrence: of_sequence


def to_bits(bits: int) -> Callable[[F64], F64]:
    """The function that rounds to so many significant bits, to nearest."""

    def rounded(x: F64) -> F64:
        mantissa, exponent = np.frexp(x)
        return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)

    return rounded


def _exact(x: F64) -> F64:
    return x


def in_dtype(dtype: str, mutant: Mutant) -> Mutant:
    """A mutant for one dtype, right for the others."""
    kept = changed(NAME, lambda values: {})
    return lambda **values: (mutant if dtype_name(values["q"].dtype) == dtype else kept)(**values)


def _operands(bits: int, dtype: str) -> Mutant:
    """The chunked form with operands of so many bits."""
    return in_dtype(dtype, patched(NAME, oracle, "recurrence", chunked(to_bits(bits))))


def _stepped(change: Callable[..., tuple[F64, F64]]) -> Mutant:
    """Another step of the recurrence: `change` gets the right one, its row and the state."""

    def make(step: Any) -> Any:
        return lambda *row, state: change(step, *row, state=state)

    return patched(NAME, oracle, "step", make)


def _decayed(g: F64, state: F64) -> F64:
    return np.exp(g)[:, None, None] * state


def _decay_last(step: Any, q: F64, k: F64, v: F64, g: F64, beta: F64, *, state: F64) -> tuple[F64, F64]:
    o, after = step(q, k, v, 0 * beta, beta, state=state)
    return o, _decayed(g, after)


def _decay_of_the_update(step: Any, q: F64, k: F64, v: F64, g: F64, beta: F64, *, state: F64) -> tuple[F64, F64]:
    before = _decayed(g, state)
    _, after = step(q, k, v, g, beta, state=state)
    after = before + _decayed(g, after - before)
    return oracle.answer(after, q), after


def _corrected(answer: Callable[..., F64]) -> Mutant:
    """Another d: `answer` of the row, the state before it and that state decayed."""

    def change(step: Any, q: F64, k: F64, v: F64, g: F64, beta: F64, *, state: F64) -> tuple[F64, F64]:
        before = _decayed(g, state)
        after = before + oracle.outer(k, answer(q, k, v, beta[:, None], state, before))
        return oracle.answer(after, q), after

    return _stepped(change)


def _output_before(step: Any, q: F64, *row: F64, state: F64) -> tuple[F64, F64]:
    _, after = step(q, *row, state=state)
    return oracle.answer(_decayed(row[2], state), q), after


def _bfloat16_state(step: Any, *row: F64, state: F64) -> tuple[F64, F64]:
    o, after = step(*row, state=state)
    return o, to_bits(8)(after)


def _nan_of_a_reset(step: Any, *row: F64, state: F64) -> tuple[F64, F64]:
    """A decay of -infinity less -infinity."""
    o, after = step(*row, state=state)
    reset = np.isneginf(row[3])[:, None]
    return np.where(reset, np.nan, o), np.where(reset[:, None], np.nan, after)


def _leaking(recurrence: Any) -> Any:
    """Each sequence goes on from the state of the one before it."""
    last: list[F64] = []

    def wrong(parts: oracle.Rows, state: F64) -> tuple[F64, F64]:
        o, after = recurrence(parts, last.pop() if last else state)
        last.append(after)
        return o, after

    return wrong


def _one_row_early(recurrence: Any) -> Any:
    def wrong(parts: oracle.Rows, state: F64) -> tuple[F64, F64]:
        o, _ = recurrence(parts, state)
        return o, recurrence([part[:-1] for part in parts], state)[1]

    return wrong


def _whole_chunks(recurrence: Any) -> Any:
    def wrong(parts: oracle.Rows, state: F64) -> tuple[F64, F64]:
        o = np.zeros(parts[2].shape)
        rows = slice(len(o) // CHUNK * CHUNK)
        o[rows], state = recurrence([part[rows] for part in parts], state)
        return o, state

    return wrong


def _chunks_forgotten(recurrence: Any) -> Any:
    """Every chunk begins without a state."""

    def wrong(parts: oracle.Rows, state: F64) -> tuple[F64, F64]:
        o = np.zeros(parts[2].shape)
        for start in range(0, len(o), CHUNK):
            rows = slice(start, start + CHUNK)
            o[rows], state = recurrence([part[rows] for part in parts], state if start == 0 else 0 * state)
        return o, state

    return wrong


def _other_group(x: Array, heads_v: int) -> Array:
    return x[:, np.arange(heads_v) % x.shape[1]]


def _scaled(power: float) -> Mutant:
    """A scale of a power of the key width."""
    return changed(NAME, lambda v: {"scale": max(v["q"].shape[-1], 1) ** power})


def _rolled(values: dict[str, Any]) -> dict[str, Any]:
    state = values["initial_state"]
    return {"initial_state": None if state is None else np.roll(state, 1, axis=0)}


def _one_plus(values: dict[str, Any]) -> dict[str, Any]:
    with np.errstate(all="ignore"):
        return {"g": np.log(np.maximum(1 + values["g"], 0))}


MUTANTS: dict[str, Mutant] = common(NAME) | {
    "state_leaks_across_sequences": patched(NAME, oracle, "recurrence", _leaking),
    "initial_state_ignored": changed(NAME, lambda v: {"initial_state": None}),
    "initial_state_of_another_sequence": changed(NAME, _rolled),
    "decay_after_the_update": _stepped(_decay_last),
    "decay_of_the_update_too": _stepped(_decay_of_the_update),
    "correction_before_the_decay": _corrected(lambda q, k, v, beta, s, b: beta * (v - oracle.answer(s, k))),
    "beta_of_v_alone": _corrected(lambda q, k, v, beta, s, b: beta * v - oracle.answer(b, k)),
    "no_correction": _corrected(lambda q, k, v, beta, s, b: beta * v),
    "q_in_the_correction": _corrected(lambda q, k, v, beta, s, b: beta * (v - oracle.answer(b, q))),
    "output_before_the_update": _stepped(_output_before),
    "no_exponential_of_g": changed(NAME, _one_plus),
    "nan_of_a_reset": _stepped(_nan_of_a_reset),
    "scale_twice": _scaled(-1.0),
    "scale_missing": _scaled(0.0),
    "given_scale_ignored": changed(NAME, lambda v: {"scale": None}),
    "final_state_one_row_early": patched(NAME, oracle, "recurrence", _one_row_early),
    "last_partial_chunk_dropped": patched(NAME, oracle, "recurrence", _whole_chunks),
    "state_lost_between_chunks": patched(NAME, oracle, "recurrence", _chunks_forgotten),
    "key_heads_of_the_wrong_group": patched(NAME, oracle, "per_value_head", lambda _: _other_group),
    "q_and_k_swapped": changed(NAME, lambda v: {"q": v["k"], "k": v["q"]}),
    "bfloat16_operands_in_float32": _operands(8, "float32"),
    "tf32_operands_in_float32": _operands(11, "float32"),
    "bfloat16_operands_in_float16": _operands(8, "float16"),
    "operands_of_5_bits_in_bfloat16": _operands(5, "bfloat16"),
}
for _dtype in FLOATS:
    MUTANTS |= {
        f"bfloat16_state_each_row_in_{_dtype}": in_dtype(_dtype, _stepped(_bfloat16_state)),
        f"bfloat16_state_between_chunks_in_{_dtype}": in_dtype(
            _dtype, patched(NAME, oracle, "recurrence", chunked(_exact, stored=to_bits(8)))
        ),
    }
