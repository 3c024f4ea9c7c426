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


def model_shapes(dtype: Any) -> list[jax.ShapeDtypeStruct]:
    """The operands of a decoding step of Qwen3-Next."""
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in ((4, 2048), (12288, 2048), (64, 2048))]


def test_cases(layer: Any, cpu_tiles: None) -> None:
    claimed = layer.module.CAPABILITY.attrs["strategy"]
    assert layer.problems([case for case in CASES.values() if case.attrs.get("strategy", "auto") in claimed]) == {}


@pytest.mark.parametrize("name", ["bfloat16-auto", "float32-auto", "bias-auto"])
def test_public_function(layer: Any, name: str) -> None:
    assert layer.public(CASES[name]) == ("passed", "")


def test_jit_and_vmap(layer: Any) -> None:
    x, w1, w2 = operands(3, 5)
    op = partial(layer.function, strategy="auto")
    batched = jax.jit(jax.vmap(op, in_axes=(0, None, None)))(x, w1, w2)
    for result, weight in zip(batched, (w1, w2), strict=True):
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


def test_gradients_reach_every_operand(jax_layer: Any) -> None:
    x, w1, w2 = operands(3)

    def total(*arrays: jax.Array) -> jax.Array:
        large, small = jax_layer.function(*arrays)
        return large.sum() + small.sum()

    gradients = jax.grad(total, argnums=(0, 1, 2))(x, w1, w2)
    np.testing.assert_allclose(gradients[0], np.tile(w1.sum(0) + w2.sum(0), (3, 1)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradients[2], np.tile(x.sum(0), (8, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers(jax_layer: Any, lowered: Any, platform: str) -> None:
    assert lowered(jax_layer.function, *model_shapes("bfloat16"), platform=platform)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_to_one_kernel(pallas_layer: Any, triton_kernels: Any, dtype: str) -> None:
    assert triton_kernels(pallas_layer.function, *model_shapes(dtype)) == 1
