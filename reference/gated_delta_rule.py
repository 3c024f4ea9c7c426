"""The oracle of `gated_delta_rule`; the formula is the docstring of `polyfuse.spec.gated_delta_rule`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from polyfuse.reference._numerics import F64, Array, Exact, to_f64
from polyfuse.reference._oracle import Error, Oracle
from polyfuse.reference.gdn_conv_prep import pool_after, slots_of, states_before
from polyfuse.spec import Capability
from polyfuse.spec.gated_delta_rule import CHUNK, LEAST_G, SPEC
from polyfuse.spec.segment_attention import DEVIATIONS

CAPABILITY = Capability(devices=("cpu",))

Flags = NDArray[np.bool_]
Rows = list[F64]  # q, k, v, g and beta, for some rows

RESET = -800.0  # exp of it is 0 in float64


def formula(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    *,
    initial_state: Array | None,
    cu_seqlens: Array | None,
    scale: float | None,
    output_final_state: bool,
    state_pool: Array | None,
    state_indices: Array | None,
    has_initial_state: Array | None,
) -> tuple[F64, ...]:
    """o [L, HV, V], final_state [F, HV, K, V], and a state_pool [slots, HV, K, V] if one is given."""
    q, k = (per_value_head(part, v.shape[1]) for part in (q, k))
    rows = [to_f64(part) for part in (q, k, v, g, beta)]
    before = states_before(q, initial_state, cu_seqlens, state_pool, state_indices, has_initial_state)
    states = first_states(before, cu_seqlens, k, v)
    o = np.zeros(v.shape)
    for number, own in enumerate(sequences(len(q), cu_seqlens)):
        o[own], states[number] = recurrence([part[own] for part in rows], states[number])
    results = factor(scale, q.shape[-1]) * o, states if output_final_state else states[:0]
    if state_pool is None:
        return results
    return *results, pool_after(state_pool, slots_of(q, cu_seqlens, state_pool, state_indices), states)


def recurrence(parts: Rows, state: F64) -> tuple[F64, F64]:
    """o [rows, HV, V] of one sequence without its scale, and the state [HV, K, V] after its last row."""
    o = np.empty(parts[2].shape)
    for t in range(len(o)):
        o[t], state = step(*(part[t] for part in parts), state=state)
    return o, state


def step(q: F64, k: F64, v: F64, g: F64, beta: F64, *, state: F64) -> tuple[F64, F64]:
    """o [HV, V] of one row, and the state after it."""
    state = np.exp(g)[:, None, None] * state
    d = beta[:, None] * (v - answer(state, k))
    state = state + outer(k, d)
    return answer(state, q), state


def outer(k: F64, d: F64) -> F64:
    """k d^T of each head: [HV, K, V]."""
    return k[:, :, None] * d[:, None, :]


def answer(state: F64, vector: F64) -> F64:
    """S^T x of each head: [HV, V]."""
    return (vector[:, None, :] @ state)[:, 0]


def per_value_head(x: Array, heads_v: int) -> Array:
    """The key head of each value head: [L, HV, K]."""
    return x[:, np.arange(heads_v) * x.shape[1] // max(heads_v, 1)]


def factor(scale: float | None, width: int) -> float:
    """What o is multiplied by."""
    return max(width, 1) ** -0.5 if scale is None else scale


def sequences(length: int, cu_seqlens: Array | None) -> Iterator[slice]:
    """The rows of each sequence."""
    ends = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    return map(slice, ends[:-1], ends[1:])


def first_states(state: Array | None, cu_seqlens: Array | None, k: Array, v: Array) -> F64:
    """The state before each sequence, [S, HV, K, V]."""
    count = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    shape = (count, v.shape[1], k.shape[2], v.shape[2])
    return np.zeros(shape) if state is None else np.array(to_f64(state))


@dataclass(frozen=True)
class Units:
    """What a call's bounds grant: relative errors, and absolute ones of an operand and of a flushed number."""

    operand: float
    step: float
    largest: float  # an operand that is finite
    sums: float
    decays: float
    o: float
    state: float
    flush_o: float
    flush_state: float

    @classmethod
    def of(cls, dtype: Any, error: Error) -> "Units":
        operand, step = error("operands")
        (o, flush_o), (state, flush_state) = error("o"), error("final_state")
        largest = float(ml_dtypes.finfo(dtype).max)
        return cls(operand, step, largest, error("sums")[0], error("decays")[0], o, state, flush_o, flush_state)


def bounds(exact: Mapping[str, F64], given: Any, error: Error) -> dict[str, Exact]:
    """An interval around each element, and anything where the spec leaves it undefined."""
    heads_v = given.v.shape[1]
    q, k = (to_f64(per_value_head(part, heads_v)) for part in (given.q, given.k))
    rows = [q, k, *(to_f64(part) for part in (given.v, given.g, given.beta))]
    pool = given.state_pool, given.state_indices, given.has_initial_state
    before = states_before(q, given.initial_state, given.cu_seqlens, *pool)
    states = first_states(before, given.cu_seqlens, k, rows[2])
    units, scale = Units.of(given.q.dtype, error), factor(given.scale, q.shape[-1])
    allowed = {"o": np.zeros(given.v.shape), "final_state": np.zeros(states.shape)}
    for number, own in enumerate(sequences(len(q), given.cu_seqlens)):
        parts = [part[own] for part in rows]
        finite = [np.where(np.isfinite(part), part, 0.0) for part in parts]
        finite[3] = np.where(np.isneginf(parts[3]), RESET, finite[3])
        state = np.where(np.isfinite(states[number]), states[number], 0.0)
        o, last = allowed["o"][own], allowed["final_state"][number]  # views
        for head in range(heads_v):
            o[:, head], last[head] = _allowed([part[:, head] for part in finite], state[head], scale, units)
        undefined, last_undefined = _undefined(parts, states[number])
        o[undefined] = np.inf
        last.swapaxes(1, 2)[last_undefined] = np.inf
    last = allowed["final_state"]
    if not given.output_final_state:
        allowed["final_state"] = last[:0]
    results = {name: _open(exact[name], far) for name, far in allowed.items()}
    if given.state_pool is not None:
        slots = slots_of(q, given.cu_seqlens, given.state_pool, given.state_indices)
        after, (relative, _) = exact["state_pool"], error("state_pool")
        sizes = np.where(np.isfinite(after), np.abs(after), 0.0)
        far, kept = np.zeros(after.shape), np.ones(after.shape, bool)
        for number, slot in enumerate(slots):
            if slot is not None:
                far[slot], kept[slot] = last[number] + relative * sizes[slot], False
        results["state_pool"] = replace(_open(after, far), kept=kept)
    return results


def _open(value: F64, far: F64) -> Exact:
    """The interval `value +- far`, open where `far` is no number; a NaN stays one unless `far` is infinite."""
    anything = np.isposinf(far) | (np.isnan(far) & np.isfinite(value))
    inside = Exact.around(value, np.where(anything, 0.0, far))
    return Exact(value, np.where(anything, -np.inf, inside.low), np.where(anything, np.inf, inside.high))


def _undefined(parts: Rows, state: F64) -> tuple[Flags, Flags]:
    """Which elements of o [rows, HV, V] and columns of the last state [HV, V] of a sequence the spec leaves undefined.

    Those that depend on an infinity, and rows of a chunk before one with an infinity or a NaN.
    """
    q, k, v, g, beta = parts
    decay = np.where(np.isneginf(g), 0.0, g)  # -infinity is a decay like another

    def touched(kind: Callable[[F64], Any]) -> Any:
        """By row, the columns of the state that a number of this kind reaches there."""
        heads = kind(k).any(-1) | kind(decay) | kind(beta)
        return heads[:, :, None] | kind(v)

    infinite = _so_far([np.isinf(state).any(-2), *touched(np.isinf)])
    undefined = infinite[1:] | np.isinf(q).any(-1, keepdims=True)
    not_finite = touched(lambda x: ~np.isfinite(x))
    for start in range(0, len(q), CHUNK):
        rows = slice(start, start + CHUNK)
        before = ~_so_far(not_finite[rows])
        undefined[rows] |= before & not_finite[rows].any(0)
    return undefined, infinite[-1]


def _so_far(flags: Any) -> Flags:
    """Whether a row or one before it is flagged."""
    found: Flags = np.logical_or.accumulate(flags)
    return found


def _allowed(parts: Rows, state: F64, scale: float, units: Units) -> tuple[F64, F64]:
    """How far o [rows, V] and the last state [K, V] of one head and sequence may be from the exact ones."""
    q, k, v = parts[:3]
    covariance = np.zeros((v.shape[1], k.shape[1], k.shape[1]))
    o, flushed = np.zeros(v.shape), np.zeros(v.shape[1])
    for start in range(0, len(q), CHUNK):
        rows = slice(start, start + CHUNK)
        chunk = Chunk([part[rows] for part in parts], state, units)
        flushed = 1 + chunk.sizes()
        o[rows] = DEVIATIONS * scale * np.sqrt(chunk.o_variance(covariance))
        o[rows] += units.flush_o * (1 + scale * np.linalg.norm(q[rows], axis=1)[:, None] * flushed)
        covariance, state = chunk.next_covariance(covariance), chunk.next_state()
    return o, DEVIATIONS * np.sqrt(np.einsum("caa->ac", covariance)) + units.flush_state * flushed


class Chunk:
    """A chunk of one head's rows in the chunked form, in float64, and the variances that its roundings may have.

    Every rounding is an error of mean zero that knows nothing of the others. Each reaches the results through the exact
    chunked form. `state` [K, V] is the exact one before the chunk. A covariance [V, K, K] is of the errors of
    the state, of each of its columns.
    """

    def __init__(self, parts: Rows, state: F64, units: Units) -> None:
        q, k, v, g, beta = parts
        self.q, self.k, self.state, self.units = q, k, state, units
        total = np.cumsum(np.maximum(g, RESET))
        self.decay = np.tril(np.exp(np.minimum(total[:, None] - total, 700.0)))
        self.before, self.after = np.exp(total), self.decay[-1]
        values, keys = beta[:, None] * v, (beta * self.before)[:, None] * k
        mixed = np.tril(beta[:, None] * self.decay * (k @ k.T), -1)
        inverse: Any = np.linalg.inv(np.eye(len(k)) + mixed)
        u, self.w = inverse @ values, inverse @ keys
        self.d = u - self.w @ state
        self.p = self.decay * (q @ k.T)
        self.fp32 = units.sums**2 + (units.decays * (16 + np.minimum(-g, -LEAST_G).clip(0).sum())) ** 2

        rounded, squares = self._rounded, state**2
        answers = values**2 + (keys @ state) ** 2
        spread = inverse**2 @ (answers + keys**2 @ squares)
        products = np.tril((beta[:, None] * self.decay) ** 2 * ((k @ k.T) ** 2 + k**2 @ k.T**2), -1)
        self.d_variance = (
            rounded(inverse) @ answers
            + inverse**2 @ (rounded(values) + rounded(keys) @ squares)
            + rounded(u)
            + rounded(self.w) @ squares
            + rounded(self.d)
            + self.fp32 * inverse**2 @ (products @ (self.d**2 + spread))
        )

    def _rounded(self, x: F64) -> F64:
        """The variance of an operand once rounded."""
        units = self.units
        variance = (units.operand**2 + self.fp32) * x**2 + units.step**2 * (x != 0)
        return np.where(np.abs(x) <= units.largest, variance, np.inf)

    def o_variance(self, covariance: F64) -> F64:
        """Of o [rows, V] without its scale."""
        squares, queries = self.state**2, self.before[:, None] * self.q
        seen = queries - self.p @ self.w  # o is `seen` times the state, and what the chunk's own values give
        products = self.decay**2 * ((self.q @ self.k.T) ** 2 + self.q**2 @ self.k.T**2)
        own = products @ self.d**2 + (queries @ self.state) ** 2 + queries**2 @ squares
        return (
            self.p**2 @ self.d_variance
            + self._rounded(self.p) @ self.d**2
            + (seen**2 + queries**2) @ self._rounded(self.state)
            + self._rounded(queries) @ squares
            + (self.fp32 + self.units.o**2) * own
            + np.einsum("cat,ta->tc", np.tensordot(covariance, seen, (1, 1)), seen)
        )

    def next_state(self) -> F64:
        """The exact state after the chunk."""
        return self.before[-1] * self.state + (self.after[:, None] * self.k).T @ self.d

    def next_covariance(self, covariance: F64) -> F64:
        """Of the state after the chunk, from that before it."""
        keys = self.after[:, None] * self.k
        replaced = -keys.T @ self.w  # of the state before, by what the chunk reads of it
        kept = self.before[-1] * np.eye(len(replaced)) + replaced
        decayed = self.before[-1] * self.state.T
        # Of d, of the state as an operand, and of d times its decay; and what of the state each of them changes.
        errors = np.concatenate(
            [self.d_variance, self._rounded(self.state), self._rounded(self.after[:, None] * self.d)]
        )
        reach = np.concatenate([keys, replaced.T, self.k])
        own = self.units.state**2 * (decayed**2 + self.d.T**2 @ keys**2) + self.d.T**2 @ self._rounded(keys)
        return (
            np.tensordot(np.tensordot(covariance, kept, (1, 1)), kept, (1, 1))
            + np.tensordot(errors, reach[:, :, None] * reach[:, None, :], (0, 0))
            + self.fp32 * decayed[:, :, None] * decayed[:, None, :]
            + own[:, :, None] * np.eye(len(kept))
        )

    def sizes(self) -> F64:
        """What a flushed product can change of the state, by its column."""
        return np.linalg.norm(self.state, axis=0) + np.linalg.norm(self.k, axis=1) @ np.abs(self.d)


gated_delta_rule = Oracle(SPEC, formula, bounds)
