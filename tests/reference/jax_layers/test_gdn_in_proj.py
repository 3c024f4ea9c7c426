"""`gdn_in_proj` in both JAX layers: right on every case, under jit, vmap and sharding, and lowered for a GPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polyfuse.conformance import cases

OP = "gdn_in_proj"
CASES = {case.name: case for case in cases(OP) if case.repeat == 1}

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def operands(*lead: int) -> tuple[jax.Array, ...]:
    """x, w_qkvz, w_ba."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((*lead, 64), (96, 64), (8, 64)))


def following() -> dict[str, jax.Array]:
    """w_z and w_a."""
    rng = np.random.default_rng(1)
    sizes = {"w_z": 40, "w_a": 6}
    return {name: jnp.asarray(rng.standard_normal((n, 64)), jnp.float32) for name, n in sizes.items()}


def joined(w1: jax.Array, w2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What w_qkvz and w_ba are as one matrix each with what `following` gives."""
    return jnp.concatenate([w1, following()["w_z"]]), jnp.concatenate([w2, following()["w_a"]])


def model_shapes(dtype: Any) -> tuple[list[jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
    """The operands of a decoding step of Qwen3.5-9B."""
    sizes = {"x": 4, "w_qkvz": 8192, "w_ba": 32, "w_z": 4096, "w_a": 32}
    x, w_qkvz, w_ba, w_z, w_a = (jax.ShapeDtypeStruct((n, 4096), dtype) for n in sizes.values())
    return [x, w_qkvz, w_ba], {"w_z": w_z, "w_a": w_a}


def test_cases(layer: Any, part: Any, cpu_tiles: None) -> None:
    claimed = layer.module.CAPABILITY.attrs["strategy"]
    mine = [case for case in CASES.values() if case.attrs.get("strategy", "auto") in claimed]
    assert layer.problems(part(mine)) == {}


@pytest.mark.parametrize("name", ["bfloat16-auto", "float32-auto", "bias-auto", "four_odd-auto", "with_a-auto"])
def test_public_function(layer: Any, name: str) -> None:
    assert layer.public(CASES[name]) == ("passed", "")


def test_jit_and_vmap(layer: Any) -> None:
    x, w1, w2 = operands(3, 5)
    op = partial(layer.function, strategy="auto", **following())
    batched = jax.jit(jax.vmap(op, in_axes=(0, None, None)))(x, w1, w2)
    for result, weight in zip(batched, joined(w1, w2), strict=True):
        np.testing.assert_allclose(result, np.asarray(x) @ np.asarray(weight).T, rtol=1e-4, atol=1e-4)


def test_sharded_rows_stay_where_they_are(jax_layer: Any, mesh: Mesh) -> None:
    x, w1, w2 = operands(8)
    rows, whole = NamedSharding(mesh, PartitionSpec("d")), NamedSharding(mesh, PartitionSpec())
    placed = jax.device_put(x, rows), jax.device_put(w1, whole), jax.device_put(w2, whole)
    compiled = jax.jit(jax_layer.function).lower(*placed).compile()
    assert "all-" not in (compiled.as_text() or "all-")
    results = compiled(*placed)
    assert all(result.sharding.is_equivalent_to(rows, result.ndim) for result in results)
    for result, want in zip(results, jax_layer.function(x, w1, w2), strict=True):
        np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-5)


def test_rows_split_over_devices(pallas_layer: Any, mesh: Mesh) -> None:
    x, w1, w2 = operands(8)
    rows, whole = PartitionSpec("d"), PartitionSpec()
    split = jax.shard_map(
        pallas_layer.function, mesh=mesh, in_specs=(rows, whole, whole), out_specs=(rows, rows), check_vma=False
    )
    results = jax.jit(split)(jax.device_put(x, NamedSharding(mesh, rows)), w1, w2)
    for result, want in zip(results, pallas_layer.function(x, w1, w2), strict=True):
        np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["auto", "merged"])
def test_gradients_reach_every_operand(jax_layer: Any, strategy: str) -> None:
    x, w1, w2 = operands(3)
    factor = jnp.arange(150.0)  # another one for each column

    def total(x: jax.Array, w1: jax.Array, w2: jax.Array, rest: dict[str, jax.Array]) -> jax.Array:
        results = jax_layer.function(x, w1, w2, strategy=strategy, **rest)
        return (jnp.concatenate(results, axis=-1) * factor).sum()

    of_x, of_w1, of_w2, rest = jax.grad(total, argnums=(0, 1, 2, 3))(x, w1, w2, following())
    weights = jnp.concatenate(joined(w1, w2))
    np.testing.assert_allclose(of_x, np.tile(factor @ weights, (3, 1)), rtol=1e-4, atol=1e-3)
    found = np.concatenate([of_w1, rest["w_z"], of_w2, rest["w_a"]])
    np.testing.assert_allclose(found, factor[:, None] * x.sum(0), rtol=1e-4, atol=1e-3)


def test_merged_is_one_product(jax_layer: Any) -> None:
    products = {}
    for strategy in ("merged", "sequential"):
        traced = jax.make_jaxpr(partial(jax_layer.function, strategy=strategy, **following()))(*operands(3))
        products[strategy] = str(traced).count("dot_general[")
    assert products == {"merged": 1, "sequential": 4}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers(jax_layer: Any, lowered: Any, platform: str) -> None:
    arrays, rest = model_shapes("bfloat16")
    assert lowered(jax_layer.function, *arrays, **rest, platform=platform)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_to_one_kernel(pallas_layer: Any, triton_kernels: Any, dtype: str) -> None:
    arrays, rest = model_shapes(dtype)
    assert triton_kernels(pallas_layer.function, *arrays, **rest) == 1
