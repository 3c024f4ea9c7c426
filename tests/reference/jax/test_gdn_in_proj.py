"""`gdn_in_proj` in jax: right on every case, under jit, vmap and sharding, and it lowers for a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import registry
from polyfuse.reference.jax.gdn_in_proj import CAPABILITY, gdn_in_proj

OP = "gdn_in_proj"
STRATEGIES = CAPABILITY.attrs["strategy"]
CASES = [c for c in cases(OP) if c.repeat == 1 and c.attrs.get("strategy", "auto") in STRATEGIES]


def operands(*lead: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((*lead, 64), (96, 64), (8, 64)))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case: Case) -> None:
    assert Trial(OP, case, 0).on(registry().get("jax")) == ("passed", "")


def test_jit_and_vmap() -> None:
    x, w1, w2 = operands(3, 5)
    op = partial(gdn_in_proj, strategy="auto")
    batched = jax.jit(jax.vmap(op, in_axes=(0, None, None)))(x, w1, w2)
    for result, weight in zip(batched, (w1, w2), strict=True):
        np.testing.assert_allclose(result, np.asarray(x) @ np.asarray(weight).T, rtol=1e-4, atol=1e-4)


def test_sharded_rows_stay_where_they_are() -> None:
    x, w1, w2 = operands(8)
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("rows",))
    rows, whole = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())
    placed = jax.device_put(x, rows), jax.device_put(w1, whole), jax.device_put(w2, whole)
    compiled = jax.jit(gdn_in_proj).lower(*placed).compile()
    assert "all-" not in (compiled.as_text() or "all-")
    results = compiled(*placed)
    assert all(result.sharding.is_equivalent_to(rows, result.ndim) for result in results)
    for result, want in zip(results, gdn_in_proj(x, w1, w2), strict=True):
        np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_operand() -> None:
    x, w1, w2 = operands(3)
    gradients = jax.grad(lambda *a: sum(jnp.sum(r) for r in gdn_in_proj(*a)), argnums=(0, 1, 2))(x, w1, w2)
    np.testing.assert_allclose(gradients[0], np.tile(w1.sum(0) + w2.sum(0), (3, 1)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradients[2], np.tile(x.sum(0), (8, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers(platform: str) -> None:
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((4, 2048), (12288, 2048), (64, 2048))]
    assert export.export(jax.jit(gdn_in_proj), platforms=[platform])(*shapes).mlir_module_serialized
