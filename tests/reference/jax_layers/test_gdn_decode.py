"""`gdn_decode` in jax.numpy: right on every case, under jit, with donated states, under vmap and sharding."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import polyfuse
from polyfuse.conformance import Trial, cases
from polyfuse.conformance.cases import model_cases
from polyfuse.spec import Unsupported

OP = "gdn_decode"
CASES = cases(OP)
HEADS = {"num_k_heads": 2, "head_k_dim": 16, "head_v_dim": 16}


def trial(name: str, seed: int = 0) -> Trial:
    return Trial(OP, next(case for case in CASES if case.name == name), seed)


def arrays(tested: Trial) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in tested.inputs()[0].items() if isinstance(value, np.ndarray)}


def test_cases(jax_layer: Any, part: Any) -> None:
    assert jax_layer.problems(part(CASES)) == {}


@pytest.mark.parametrize("name", ["bfloat16-bfloat16", "indices_int64-h2-hv4", "tokens_4-int32-accepted"])
def test_public_function(jax_layer: Any, name: str) -> None:
    assert jax_layer.public(trial(name).case) == ("passed", "")


def test_real_shapes(jax_layer: Any) -> None:
    own = {case.name for case in CASES}
    real = [case for case in model_cases(OP) if case.name not in own]
    assert real
    assert jax_layer.problems(real) == {}


def test_donated_states_are_used_again(jax_layer: Any) -> None:
    """In place after all: the new states lie where the old ones did."""
    tested = trial("indices_int32-h2-hv4")
    values = arrays(tested)
    states = [values.pop("conv_state"), values.pop("recurrent_state")]
    addresses = [state.unsafe_buffer_pointer() for state in states]

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(conv_state: jax.Array, recurrent_state: jax.Array) -> Any:
        function = jax_layer.function
        return function(**values, **HEADS, conv_state=conv_state, recurrent_state=recurrent_state)

    results = step(*states)
    assert all(state.is_deleted() for state in states)
    assert [state.unsafe_buffer_pointer() for state in results[1:]] == addresses
    assert tested.check(results, tested.inputs()[1]) is None


def test_vmap_over_pools(jax_layer: Any) -> None:
    name = "tokens_4-int32-accepted"
    tested = [trial(name, seed) for seed in (1, 2)]
    attrs = {"num_k_heads": 1, "head_k_dim": 16, "head_v_dim": 16}
    one, other = map(arrays, tested)
    both = {key: jnp.stack([one[key], other[key]]) for key in one}
    results = jax.vmap(lambda values: jax_layer.function(**values, **attrs))(both)
    for i, each in enumerate(tested):
        assert each.check([np.asarray(result[i]) for result in results], each.inputs()[1]) is None


def test_sequences_over_devices(jax_layer: Any, mesh: Mesh) -> None:
    """Pools are spread by slots, and what is read by sequences, on different devices."""
    tested = trial("x_zeros")
    rows = NamedSharding(mesh, PartitionSpec("d"))
    values = arrays(tested)
    for name in ("x", "z", "a", "b"):
        values[name] = jax.device_put(values[name], rows)
    results = jax.jit(partial(jax_layer.function, **HEADS))(**values)
    assert len(results[0].sharding.device_set) == 4
    assert tested.check(results, tested.inputs()[1]) is None


def test_gradients_are_refused(jax_layer: Any) -> None:
    values = arrays(trial("float32-float32"))
    x = values.pop("x")
    with pytest.raises(Unsupported, match="no backward"):
        jax.grad(lambda x: polyfuse.gdn_decode(x, **values, **HEADS)[0].sum())(x)
