"""`gated_delta_rule` in jax.numpy: right on every case, under jit and vmap, and lowered."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polyfuse
from polyfuse.conformance import Case, Trial, cases
from polyfuse.conformance.cases import model_cases
from polyfuse.spec import Unsupported

OP = "gated_delta_rule"
CASES = [*cases(OP), *model_cases(OP)]
USUAL = {"q": "unit", "k": "unit", "g": "decay", "beta": "gate", "cu_seqlens": "cu_seqlens"}
PACKED: dict[str, Any] = {
    "dims": {"L": 25, "H": 2, "HV": 4, "K": 8, "V": 6, "N": 9, "S": 8},  # lengths 2, 0, 5, 3, 1, 6, 4, 2; two past them
    "attrs": {"output_final_state": True},
    "present": ("initial_state", "cu_seqlens"),
    "fill": USUAL,
}


def test_cases(jax_layer: Any, part: Any) -> None:
    assert jax_layer.problems(part(CASES)) == {}


@pytest.mark.parametrize("name", ["bfloat16-h2-hv4", "float32-packed-int64-initial_state"])
def test_public_function(jax_layer: Any, name: str) -> None:
    [case] = [case for case in CASES if case.name == name]
    assert jax_layer.public(case) == ("passed", "")


@pytest.mark.parametrize("ends", [[2, 2, 5, 5, 9, 10, 10, 12, 12], [25] * 9, [0] * 9, [0] * 8 + [25]])
def test_rows_outside_all_sequences(jax_layer: Any, ends: list[int]) -> None:
    trial = Trial(OP, Case("outside", **PACKED), seed=0)
    values = trial.inputs()[0]
    values["cu_seqlens"] = np.array(ends, np.int32)
    assert jax_layer.problem(trial) is None
    o, _ = jax_layer.call(values)
    assert not np.asarray(o)[ends[-1] :].any()
    assert not np.asarray(o)[: ends[0]].any()


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state"])
def test_nan_stays_in_its_sequence(jax_layer: Any, name: str) -> None:
    values = Trial(OP, Case("packed", **PACKED), seed=0).inputs()[0]
    spoiled = values[name].copy()
    spoiled[2 if name == "initial_state" else slice(2, 7)] = np.nan  # the third sequence
    clean, results = jax_layer.call(values), jax_layer.call(values | {name: spoiled})
    assert jnp.isnan(results[0][2:7]).all()
    np.testing.assert_array_equal(np.delete(results[0], slice(2, 7), 0), np.delete(clean[0], slice(2, 7), 0))
    np.testing.assert_array_equal(np.delete(results[1], 2, 0), np.delete(clean[1], 2, 0))


def arguments(rows: int, states: int) -> tuple[jax.Array, ...]:
    """q, k, v, g, beta and the initial states."""
    sizes = {"L": rows, "H": 2, "HV": 4, "K": 8, "V": 6, "S": states}
    case = Case("random", sizes, present=("initial_state",), fill=USUAL)
    values = Trial(OP, case, seed=0).inputs()[0]
    return tuple(jnp.asarray(values[name]) for name in ("q", "k", "v", "g", "beta", "initial_state"))


def op(function: Any, *arrays: jax.Array, **options: Any) -> Any:
    *rows, state = arrays
    return function(*rows, initial_state=state, output_final_state=True, **options)


@pytest.mark.parametrize("cut", [1, 6])
def test_a_sequence_goes_on_from_its_final_state(jax_layer: Any, cut: int) -> None:
    run = jax.jit(partial(op, jax_layer.function))
    *rows, state = arguments(7, 1)
    whole, last = run(*rows, state)
    head, middle = run(*(part[:cut] for part in rows), state)
    tail, end = run(*(part[cut:] for part in rows), middle)
    np.testing.assert_allclose(jnp.concatenate([head, tail]), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(end, last, rtol=1e-5, atol=1e-6)


def pooled(name: str, seed: int = 0) -> tuple[Trial, dict[str, jax.Array]]:
    """A case with a pool, and its arrays."""
    [case] = [case for case in CASES if case.name == f"pool-{name}"]
    trial = Trial(OP, case, seed)
    return trial, {name: jnp.asarray(x) for name, x in trial.inputs()[0].items() if isinstance(x, np.ndarray)}


@pytest.mark.parametrize("name", ["float32-float32", "bfloat16-float16"])
def test_a_pool_is_an_initial_and_a_final_state(jax_layer: Any, name: str) -> None:
    values = pooled(name)[1]
    pool, indices, valid = (values.pop(name) for name in ("state_pool", "state_indices", "has_initial_state"))
    read = valid & (indices >= 0)
    states = jnp.where(read[:, None, None, None], pool[indices], 0).astype(jnp.float32)
    wanted, last = jax_layer.call(values | {"initial_state": states, "output_final_state": True})
    given = {"state_pool": pool, "state_indices": indices, "has_initial_state": valid}
    o, nothing, after = jax_layer.call(values | given)
    assert nothing.shape == (0, *pool.shape[1:])
    np.testing.assert_array_equal(o, wanted)
    owned = np.asarray(indices >= 0)
    np.testing.assert_array_equal(after[indices[owned]], last[owned].astype(pool.dtype))
    others = np.setdiff1d(np.arange(len(pool)), indices[owned])
    assert np.asarray(after[others]).tobytes() == np.asarray(pool[others]).tobytes()


def test_a_donated_pool_is_used_again(jax_layer: Any) -> None:
    """In place after all: the new states lie where the old ones did."""
    trial, values = pooled("out_of_range-int32")
    pool = values.pop("state_pool")
    address = pool.unsafe_buffer_pointer()
    step = jax.jit(lambda pool: jax_layer.function(**values, state_pool=pool), donate_argnums=0)
    results = step(pool)
    assert pool.is_deleted()
    assert results[2].unsafe_buffer_pointer() == address
    assert trial.check(results, trial.inputs()[1]) is None


def test_vmap_over_pools(jax_layer: Any) -> None:
    trials, arrays = zip(*(pooled("with_state_indices", seed) for seed in (1, 2)), strict=True)
    both = {name: jnp.stack([values[name] for values in arrays]) for name in arrays[0]}
    results = jax.vmap(lambda values: jax_layer.function(**values))(both)
    for i, trial in enumerate(trials):
        assert trial.check([np.asarray(result[i]) for result in results], trial.inputs()[1]) is None


def test_vmap(jax_layer: Any) -> None:
    run = jax.jit(partial(op, jax_layer.function))
    *rows, state = arguments(15, 1)
    stacked = [part.reshape(3, 5, *part.shape[1:]) for part in rows]
    batched = jax.vmap(run, in_axes=(0, 0, 0, 0, 0, None))(*stacked, state)
    for i in range(3):
        for result, want in zip(batched, run(*(part[i] for part in stacked), state), strict=True):
            np.testing.assert_allclose(result[i], want, rtol=1e-5, atol=1e-6)


def test_gradients_are_refused() -> None:
    *rows, state = arguments(3, 1)

    def total(v: jax.Array) -> jax.Array:
        q, k, _, g, beta = rows
        return polyfuse.gated_delta_rule(q, k, v, g, beta, initial_state=state, backend="jax").o.sum()

    assert jnp.isfinite(total(rows[2]))
    with pytest.raises(Unsupported, match="no backward"):
        jax.grad(total)(rows[2])


def test_it_lowers_to_one_loop(jax_layer: Any, lowered: Any) -> None:
    shapes = [jax.ShapeDtypeStruct((64, *part.shape[1:]), part.dtype) for part in arguments(1, 1)[:5]]
    text = lowered(jax_layer.function, *shapes)
    assert text.count("stablehlo.while") == 1
