"""`gated_delta_rule` in jax.numpy: the recurrence as the docstring of `polyfuse.spec.gated_delta_rule` has it.

Every array may be traced and vmapped.
"""

import jax
import jax.numpy as jnp
from jax import lax

from polyfuse.reference._jax.compilation import jit
from polyfuse.reference._jax.sequences import sequences, states_before
from polyfuse.spec import Capability

CAPABILITY = Capability()


@jit("gated_delta_rule")
def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
    state_pool: jax.Array | None = None,
    state_indices: jax.Array | None = None,
    has_initial_state: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """o [L, HV, V], rounded once, final_state [F, HV, K, V], and a state_pool [slots, HV, K, V] if one is given."""
    rows, heads_v, width_v = v.shape
    width = q.shape[2]
    count = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    factor = max(width, 1) ** -0.5 if scale is None else scale
    group = heads_v // max(q.shape[1], 1)
    number, _ = sequences(rows, cu_seqlens)
    outside = (number < 0) | (number >= count)
    number = jnp.where(outside, count, number)  # of no state: what is written there is dropped
    slots, before = states_before(initial_state, state_pool, state_indices, has_initial_state, cu_seqlens)
    shape = (count, heads_v, width, width_v)
    states = jnp.zeros(shape, jnp.float32) if before is None else before.astype(jnp.float32)

    def step(states: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        """The states of all sequences after a row, and its o [HV, V]."""
        own, *values = row
        queries, keys, v, g, beta = (x.astype(jnp.float32) for x in values)
        queries, keys = (jnp.repeat(x, group, axis=0)[:, :, None] for x in (queries, keys))  # [HV, K, 1]
        state = jnp.exp(g)[:, None, None] * states.at[own].get(mode="clip")
        d = beta[:, None] * (v - (keys * state).sum(1))
        state += keys * d[:, None]
        return states.at[own].set(state, mode="drop"), factor * (queries * state).sum(1)

    states, o = lax.scan(step, states, (number, q, k, v, g, beta))
    o = jnp.where(outside[:, None, None], 0, o)
    results = o.astype(v.dtype), states if output_final_state else states[:0]
    if state_pool is None:
        return results
    return *results, state_pool.at[slots].set(states.astype(state_pool.dtype), mode="drop")
