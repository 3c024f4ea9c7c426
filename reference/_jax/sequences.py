"""The packed sequences of `gdn_conv_prep` in jax.numpy, for both JAX layers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def sequences(length: int, cu_seqlens: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return for each row its sequence's number, -1 before the first one, and how many of its rows come before it."""
    row = jnp.arange(length, dtype=jnp.int32)
    if cu_seqlens is None:
        return jnp.zeros_like(row), row
    starts = cu_seqlens.astype(jnp.int32)
    number = jnp.searchsorted(starts, row, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    return number, row - jnp.where(number < 0, 0, starts[number])


def states_before(
    initial_state: jax.Array | None,
    pool: jax.Array | None,
    state_indices: jax.Array | None,
    has_initial_state: jax.Array | None,
    cu_seqlens: jax.Array | None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Return the slot of each sequence in the pool, past the last for none, and what is there [S, ...], or zeros.

    Without a pool there are no slots, and the states are the initial ones.
    """
    if pool is None:
        return None, initial_state
    count = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    slots = jnp.arange(count) if state_indices is None else state_indices
    slots = jnp.where((slots >= 0) & (slots < len(pool)), slots, len(pool))
    old = pool.at[slots].get(mode="fill", fill_value=0)
    if has_initial_state is not None:
        old = jnp.where(jnp.expand_dims(has_initial_state, tuple(range(1, old.ndim))), old, 0)
    return slots, old


def final_state(
    x: jax.Array,
    channels: Callable[[jax.Array], jax.Array],
    state: jax.Array | None,
    cu_seqlens: jax.Array | None,
    before: int,
    wanted: bool,
) -> jax.Array:
    """Return the last `before` inputs of each sequence, oldest first [S, C, before]; of no sequence if not `wanted`.

    `channels` takes rows of x to their C channels. The result has the dtype of `state`, or else of x.
    """
    starts = jnp.array([0, len(x)]) if cu_seqlens is None else cu_seqlens
    count = len(starts) - 1 if wanted else 0
    if state is None:
        state = jnp.zeros((count, channels(x[:0]).shape[1], before), x.dtype)
    if len(x) == 0 or count == 0:
        return state[:count]
    rows = starts[1:, None] - before + jnp.arange(before)  # [S, before]
    missing = starts[:-1, None] - rows  # how far before the sequence; at most 0 inside it
    kept = jnp.take_along_axis(state, jnp.maximum(before - missing, 0)[:, None], axis=2, mode="clip")
    last = channels(x.at[rows].get(mode="clip")).transpose(0, 2, 1).astype(state.dtype)
    return jnp.where((missing > 0)[:, None], kept, last)


def states_after(
    x: jax.Array,
    channels: Callable[[jax.Array], jax.Array],
    state: jax.Array | None,
    cu_seqlens: jax.Array | None,
    before: int,
    wanted: bool,
    pool: jax.Array | None,
    slots: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """Return `final_state`; with a pool none of it, and the pool with each sequence's new state in its slot."""
    if pool is None:
        return (final_state(x, channels, state, cu_seqlens, before, wanted),)
    new = final_state(x, channels, state, cu_seqlens, pool.shape[2], True)
    return jnp.zeros((0, pool.shape[1], before), x.dtype), pool.at[slots].set(new, mode="drop")
