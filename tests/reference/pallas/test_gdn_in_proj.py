"""`gdn_in_proj` in pallas: right on every case, under jit, vmap and sharding, and it lowers for a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import registry
from polyfuse.reference.pallas.gdn_in_proj import CAPABILITY, gdn_in_proj

OP = "gdn_in_proj"
STRATEGIES = CAPABILITY.attrs["strategy"]
CASES = [c for c in cases(OP) if c.repeat == 1 and c.attrs.get("strategy", "auto") in STRATEGIES]


def operands(*lead: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((*lead, 64), (96, 64), (8, 64)))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case: Case) -> None:
    assert Trial(OP, case, 0).on(registry().get("pallas")) == ("passed", "")


def test_jit_and_vmap() -> None:
    x, w1, w2 = operands(3, 5)
    op = partial(gdn_in_proj, strategy="auto")
    batched = jax.jit(jax.vmap(op, in_axes=(0, None, None)))(x, w1, w2)
    for result, weight in zip(batched, (w1, w2), strict=True):
        np.testing.assert_allclose(result, np.asarray(x) @ np.asarray(weight).T, rtol=1e-4, atol=1e-4)


def test_rows_split_over_devices() -> None:
    x, w1, w2 = operands(8)
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("rows",))
    rows, whole = PartitionSpec("rows"), PartitionSpec()
    split = jax.shard_map(
        gdn_in_proj, mesh=mesh, in_specs=(rows, whole, whole), out_specs=(rows, rows), check_vma=False
    )
    results = jax.jit(split)(jax.device_put(x, NamedSharding(mesh, rows)), w1, w2)
    for result, want in zip(results, gdn_in_proj(x, w1, w2), strict=True):
        np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_lowers_to_one_kernel(dtype: jnp.dtype) -> None:
    shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((4, 2048), (12288, 2048), (64, 2048))]
    checks = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    lowered = export.export(jax.jit(gdn_in_proj), platforms=["cuda"], disabled_checks=checks)(*shapes)
    assert lowered.mlir_module().count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 1
