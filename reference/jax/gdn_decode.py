"""`gdn_decode` in jax.numpy; the formula is the docstring of `polyfuse.spec.gdn_decode`.

Every array may be traced, vmapped and sharded. Nothing is written in place: the states come back as new arrays, whose
memory is the old ones' where those are donated.
"""

import jax
import jax.numpy as jnp
from jax import lax

from polyfuse.reference._jax.compilation import jit
from polyfuse.reference._jax.projection import channels_of
from polyfuse.reference.jax.gdn_post_conv import gates, normalised
from polyfuse.spec import FP32_TINY, Capability

CAPABILITY = Capability()


@jit("gdn_decode")
def gdn_decode(
    x: jax.Array,
    z: jax.Array | None,
    a: jax.Array,
    b: jax.Array,
    conv_weight: jax.Array,
    A_log: jax.Array,
    dt_bias: jax.Array,
    norm_weight: jax.Array,
    conv_state: jax.Array,
    recurrent_state: jax.Array,
    *,
    conv_bias: jax.Array | None = None,
    state_indices: jax.Array | None = None,
    num_accepted: jax.Array | None = None,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    interleaved: bool = False,
    l2norm_eps: float = 1e-6,
    norm_eps: float = 1e-6,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """out, conv_state, recurrent_state."""
    lead, heads_v = x.shape[:-1], len(A_log)
    batch, tokens = lead if len(lead) == 2 else (lead[0], 1)
    if batch == 0:
        return jnp.zeros((*lead, heads_v * head_v_dim), x.dtype), conv_state, recurrent_state
    slots = _slots_of_tokens(batch, tokens, state_indices)
    accepted = None if num_accepted is None else jnp.clip(num_accepted, 1, tokens)
    inputs = channels_of(num_k_heads, head_k_dim, interleaved)(x).reshape(batch, tokens, -1)
    gate = x.reshape(*lead, num_k_heads, -1)[..., -(heads_v // num_k_heads * head_v_dim) :] if z is None else z

    found = _rows(conv_state, slots[:, 0]).swapaxes(1, 2)  # [B, n, C]
    window = _window(found, accepted, conv_weight.shape[1] - 1)
    y = jax.nn.silu(_conv(window, inputs, conv_weight, conv_bias))
    old = found if len(lead) == 1 else window
    shifted = jnp.concatenate([old, inputs.astype(found.dtype)], axis=1)[:, 1:]
    if len(lead) == 2:
        written = conv_weight.shape[1] - 2 + jnp.sum(slots >= 0, axis=1)
        shifted = jnp.where(jnp.arange(found.shape[1])[:, None] < written[:, None, None], shifted, found)

    width, group = num_k_heads * head_k_dim, heads_v // num_k_heads
    q, k, v = jnp.split(y, (width, 2 * width), axis=2)
    q, k = (normalised(part.reshape(batch, tokens, num_k_heads, head_k_dim), l2norm_eps) for part in (q, k))
    q, k = (jnp.repeat(part, group, axis=2)[..., None] for part in (q, k))
    v = v.reshape(batch, tokens, heads_v, 1, head_v_dim)
    a, b = (part.reshape(batch * tokens, heads_v) for part in (a, b))
    of_rows = gates(a, b, A_log, dt_bias, output_g_exp=True)
    decay, beta = (part.reshape(batch, tokens, heads_v, 1, 1) for part in of_rows)

    first = slots[:, 0]
    if accepted is not None and state_indices is not None:
        first = jnp.where(first < 0, first, jnp.take_along_axis(state_indices, accepted[:, None] - 1, axis=1)[:, 0])
    S = jnp.where((first >= 0)[:, None, None, None], _rows(recurrent_state, first).astype(jnp.float32), 0.0)
    results = []
    for t in range(tokens):
        o, S = _step(S, *(part[:, t] for part in (q, k, v, decay, beta)))
        results.append((o[:, :, 0] * (head_k_dim**-0.5 if scale is None else scale), S))
    o, states = (jnp.stack(part, axis=1) for part in zip(*results, strict=True))
    out = _rms_normalised(o, norm_eps) * norm_weight.astype(jnp.float32)
    out *= jax.nn.silu(gate.astype(jnp.float32).reshape(out.shape))
    out = jnp.where((slots >= 0)[..., None, None], out, 0.0).astype(x.dtype).reshape(*lead, -1)
    states = states.reshape(batch * tokens, *recurrent_state.shape[1:])
    return (
        out,
        _stored(conv_state, slots[:, 0], shifted.swapaxes(1, 2)),
        _stored(recurrent_state, slots.ravel(), states),
    )


def _slots_of_tokens(batch: int, tokens: int, state_indices: jax.Array | None) -> jax.Array:
    """The slot of each token [B, T], -1 for padding: from the first negative one of a sequence on."""
    if state_indices is None:
        return jnp.arange(batch)[:, None]
    slots = state_indices.reshape(batch, tokens)
    return jnp.where(lax.cumsum((slots < 0).astype(jnp.int32), axis=1) == 0, slots, -1)


def _rows(pool: jax.Array, slots: jax.Array) -> jax.Array:
    """The rows of a pool, any one for a negative slot."""
    return pool.at[jnp.maximum(slots, 0)].get(mode="clip")


def _stored(pool: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    """The pool with rows in their slots, except for those of negative ones."""
    return pool.at[jnp.where(slots >= 0, slots, len(pool))].set(rows.astype(pool.dtype), mode="drop")


def _window(found: jax.Array, accepted: jax.Array | None, before: int) -> jax.Array:
    """The inputs before each sequence's first token [B, W - 1, C], of what the conv state holds [B, n, C]."""
    if accepted is None:
        return found[:, found.shape[1] - before :]
    places = accepted[:, None] - 1 + jnp.arange(before)
    return jnp.take_along_axis(found, places[:, :, None], axis=1)


def _conv(window: jax.Array, inputs: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """c [B, T, C] in float32."""
    rows = jnp.concatenate([window.astype(jnp.float32), inputs.astype(jnp.float32)], axis=1)
    taps, tokens = weight.astype(jnp.float32).T, inputs.shape[1]
    c = sum(rows[:, tap : tap + tokens] * taps[tap] for tap in range(1, len(taps)))
    c += rows[:, :tokens] * taps[0]
    return c if bias is None else c + bias.astype(jnp.float32)


def _step(
    S: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, beta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """o without its scale [B, HV, 1, V] and the new S of one token; q and k are [B, HV, K, 1]."""
    S = decay * S
    d = beta * (v - jnp.sum(S * k, axis=-2, keepdims=True))
    S = S + k * d
    return jnp.sum(S * q, axis=-2, keepdims=True), S


def _rms_normalised(o: jax.Array, eps: float) -> jax.Array:
    """float32, over the last axis."""
    return o * lax.rsqrt(jnp.mean(o * o, axis=-1, keepdims=True) + max(eps, FP32_TINY))
