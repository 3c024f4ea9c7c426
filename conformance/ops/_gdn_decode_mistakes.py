"""Wrong implementations of `gdn_decode`: each makes one mistake that a kernel author could make."""

from typing import Any

import numpy as np

from polyfuse.conformance.mutations import Mutant, changed, common, patched, right
from polyfuse.reference import gdn_decode as oracle
from polyfuse.reference._numerics import F64, Array, round_to, to_f64
from polyfuse.reference.gdn_decode import product
from polyfuse.spec.gdn_decode import NAME


def _with_step(change: Any) -> Mutant:
    """Another step of the delta rule: `change` takes S, q, k, v, decay, beta and scale, and returns o and the new S."""
    return patched(NAME, oracle, "step", lambda step: change)


def _decay_after_the_update(S: F64, q: F64, k: F64, v: F64, decay: F64, beta: F64, scale: float) -> Any:
    S = decay * (S + k * beta * (v - product(S, k)))
    return scale * product(S, q), S


def _undecayed_prediction(S: F64, q: F64, k: F64, v: F64, decay: F64, beta: F64, scale: float) -> Any:
    S = decay * S + k * beta * (v - product(S, k))
    return scale * product(S, q), S


def _beta_on_v_alone(S: F64, q: F64, k: F64, v: F64, decay: F64, beta: F64, scale: float) -> Any:
    S = decay * S + k * (beta * v - product(decay * S, k))
    return scale * product(S, q), S


def _o_of_the_old_state(S: F64, q: F64, k: F64, v: F64, decay: F64, beta: F64, scale: float) -> Any:
    old = decay * S
    return scale * product(old, q), old + k * beta * (v - product(old, k))


def _o_without_decay(S: F64, q: F64, k: F64, v: F64, decay: F64, beta: F64, scale: float) -> Any:
    write = k * beta * (v - product(decay * S, k))
    return scale * product(S + write, q), decay * S + write


def _state_rounded_first(**values: Any) -> Any:
    """S is rounded to the dtype of its pool before o, and the next token, see it."""
    dtype = values["recurrent_state"].dtype.name

    def make(step: Any) -> Any:
        def wrong(S: F64, q: F64, k: F64, v: F64, decay: F64, beta: F64, scale: float) -> Any:
            _, S = step(S, q, k, v, decay, beta, scale)
            S = to_f64(round_to(S, dtype))
            return scale * product(S, q), S

        return wrong

    return patched(NAME, oracle, "step", make)(**values)


def _state_in_bfloat16(**values: Any) -> Any:
    out, conv_state, state = right(NAME, values)
    return out, conv_state, round_to(to_f64(round_to(to_f64(state), "bfloat16")), state.dtype.name)


def _conv_rounded(**values: Any) -> Any:
    """The conv with its SiLU as one kernel, whose results have x's dtype."""
    dtype = values["x"].dtype.name

    def make(silu: Any) -> Any:
        return lambda c: to_f64(round_to(silu(c), dtype)) if c.ndim == 2 else silu(c)

    return patched(NAME, oracle, "silu", make)(**values)


def _norm_rounded(**values: Any) -> Any:
    """The delta rule and the norm as two kernels, between which o has x's dtype."""
    dtype = values["x"].dtype.name

    def make(rule: Any) -> Any:
        def wrong(*args: Any) -> Any:
            o, states = rule(*args)
            return to_f64(round_to(o, dtype)), states

        return wrong

    return patched(NAME, oracle, "delta_rule", make)(**values)


def _identity_where(ndim: int) -> Any:
    """SiLU left out of the conv, whose c has 2 dimensions, or of the gate, which has 3."""
    return lambda silu: lambda c: c if c.ndim == ndim else silu(c)


def _rows_as_slots(token_slots: Any) -> Any:
    """Slot b for sequence b, whatever state_indices says of those that have one."""

    def wrong(x: Array, state_indices: Array | None) -> Any:
        slots = token_slots(x, state_indices)
        return np.where(slots >= 0, np.arange(slots.size).reshape(slots.shape), slots)

    return wrong


def _last_slot_for_none(stored: Any) -> Any:
    return lambda state, states, slots: stored(state, states, np.where(slots < 0, len(state) - 1, slots))


def _others_zeroed(stored: Any) -> Any:
    def wrong(*args: Any) -> Any:
        new, written = stored(*args)
        return np.where(written, new, 0.0), written

    return wrong


def _last_token_everywhere(stored: Any) -> Any:
    return lambda state, states, slots: stored(state, np.broadcast_to(states[:, -1:], states.shape), slots)


def _not_shifted(shifted: Any) -> Any:
    return lambda state, *rest: (to_f64(state), shifted(state, *rest)[1])


def _shifted_by_one_more(shifted: Any) -> Any:
    def wrong(*args: Any) -> Any:
        new, written = shifted(*args)
        return np.where(written, np.roll(new, -1, axis=2), new), written

    return wrong


def _padding_shifts_too(shifted: Any) -> Any:
    def wrong(state: Array, before: F64, inputs: Array, slots: Any, several: bool) -> Any:
        return shifted(state, before, inputs, np.where(slots[:, :1] >= 0, np.abs(slots), -1), several)

    return wrong


def _first_columns(inputs_before: Any) -> Any:
    """The oldest W - 1 columns in place of the last ones, where n is greater."""
    return lambda state, slots, accepted, width: inputs_before(state[:, :, : width - 1], slots, None, width)


def _neighbours_state(state_before: Any) -> Any:
    return lambda *args: np.roll(state_before(*args), 1, axis=0)


def _first_slot(state_before: Any) -> Any:
    return lambda state, slots, indices, accepted: state_before(state, slots, indices, None)


def _other_key_heads(by_token: Any) -> Any:
    """Value head j reads key head j % H in place of j // (HV / H)."""

    def wrong(slots: Any, q: F64, k: F64, v: F64, *rest: F64) -> Any:
        group = v.shape[1] // q.shape[1]
        return by_token(slots, np.tile(q, (1, group, 1)), np.tile(k, (1, group, 1)), v, *rest)

    return wrong


def _eps_outside(inverse_rms: Any) -> Any:
    def wrong(x: F64, eps: float) -> F64:
        return 1 / (np.sqrt((x * x).mean(-1, keepdims=True)) + eps)

    return wrong


def _floor_of_the_norm(inverse_norm: Any) -> Any:
    def wrong(x: F64, eps: float) -> F64:
        return 1 / np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), eps)

    return wrong


def _z_of_the_values(parted: Any) -> Any:
    """The columns of v taken for those of z, with interleaved."""

    def wrong(x: Array, z: Array | None, heads: int, width: int) -> Any:
        inputs, gate = parted(x, z, heads, width)
        return inputs, inputs[:, 2 * heads * width :] if z is None else gate

    return wrong


def _read_as_plain(parted: Any) -> Any:
    """An interleaved x read as if its first columns were [q | k | v] and the others z."""

    def wrong(x: Array, z: Array | None, heads: int, width: int) -> Any:
        inputs, gate = parted(x, z, heads, width)
        rows = to_f64(x).reshape(len(inputs), x.shape[-1])
        return (rows[:, : inputs.shape[1]], rows[:, inputs.shape[1] :]) if z is None else (inputs, gate)

    return wrong


MUTANTS: dict[str, Mutant] = common(NAME) | {
    "neighbours_state": patched(NAME, oracle, "state_before", _neighbours_state),
    "rows_as_slots": patched(NAME, oracle, "token_slots", _rows_as_slots),
    "padding_stored_in_the_last_slot": patched(NAME, oracle, "stored", _last_slot_for_none),
    "other_slots_zeroed": patched(NAME, oracle, "stored", _others_zeroed),
    "last_token_in_all_slots": patched(NAME, oracle, "stored", _last_token_everywhere),
    "first_slot_read": patched(NAME, oracle, "state_before", _first_slot),
    "num_accepted_ignored": changed(NAME, lambda v: {"num_accepted": None}),
    "conv_state_not_shifted": patched(NAME, oracle, "shifted", _not_shifted),
    "conv_state_shifted_by_two": patched(NAME, oracle, "shifted", _shifted_by_one_more),
    "conv_state_shifted_by_padding": patched(NAME, oracle, "shifted", _padding_shifts_too),
    "first_columns_of_the_conv_state": patched(NAME, oracle, "inputs_before", _first_columns),
    "decay_after_the_update": _with_step(_decay_after_the_update),
    "undecayed_prediction": _with_step(_undecayed_prediction),
    "beta_on_v_alone": _with_step(_beta_on_v_alone),
    "o_of_the_old_state": _with_step(_o_of_the_old_state),
    "o_without_decay": _with_step(_o_without_decay),
    "state_rounded_first": _state_rounded_first,
    "state_in_bfloat16": _state_in_bfloat16,
    "conv_rounded": _conv_rounded,
    "norm_rounded": _norm_rounded,
    "scale_twice": patched(NAME, oracle, "factor", lambda factor: lambda *args: factor(*args) ** 2),
    "scale_missing": patched(NAME, oracle, "factor", lambda factor: lambda *args: 1.0),
    "eps_outside_the_root": patched(NAME, oracle, "inverse_rms", _eps_outside),
    "eps_as_a_floor": patched(NAME, oracle, "inverse_norm", _floor_of_the_norm),
    "norm_weight_dropped": changed(NAME, lambda v: {"norm_weight": np.ones_like(v["norm_weight"])}),
    "gate_without_silu": patched(NAME, oracle, "silu", _identity_where(3)),
    "conv_without_silu": patched(NAME, oracle, "silu", _identity_where(2)),
    "conv_bias_dropped": changed(NAME, lambda v: {"conv_bias": None}),
    "dt_bias_dropped": changed(NAME, lambda v: {"dt_bias": np.zeros_like(v["dt_bias"])}),
    "a_and_b_swapped": changed(NAME, lambda v: {"a": v["b"], "b": v["a"]}),
    "other_key_heads": patched(NAME, oracle, "by_token", _other_key_heads),
    "interleaved_read_as_plain": patched(NAME, oracle, "parted", _read_as_plain),
    "values_as_gate": patched(NAME, oracle, "parted", _z_of_the_values),
}
