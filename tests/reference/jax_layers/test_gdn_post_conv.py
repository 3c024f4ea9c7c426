"""`gdn_post_conv` in both JAX layers: right on every case, under jit, vmap, grad and sharding, and lowered."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from polyfuse.conformance import Case, Trial, cases
from polyfuse.conformance.cases import model_cases
from polyfuse.spec import FP32_TINY, Unsupported

OP = "gdn_post_conv"
SUBNORMAL = [case for case in cases(OP) if case.fill.get("conv_out") == "subnormal"]
CASES = {case.name: case for case in cases(OP) if case.repeat == 1 and case not in SUBNORMAL}
HEADS = {"num_k_heads": 2, "head_k_dim": 16, "head_v_dim": 8}
HEADS_V = 4
WIDTH = 2 * 2 * 16 + HEADS_V * 8

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def random_arguments(*lead: int) -> tuple[jax.Array, ...]:
    """conv_out, a, b, A_log, dt_bias."""
    rng = np.random.default_rng(5)
    shapes = [(*lead, WIDTH), (*lead, HEADS_V), (*lead, HEADS_V), (HEADS_V,), (HEADS_V,)]
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def test_cases(layer: Any, part: Any, cpu_tiles: None) -> None:
    assert layer.problems(part(list(CASES.values()))) == {}


@pytest.mark.parametrize("case", SUBNORMAL, ids=lambda case: case.name)
def test_float32_subnormals_may_be_flushed(layer: Any, cpu_tiles: None, case: Case) -> None:
    trial = Trial(OP, case, seed=0)
    q, k, v, *_ = layer.call(trial.inputs()[0])
    # The norm of such a vector is sqrt(eps), 1e-3.
    for name, result in (("q", q), ("k", k)):
        np.testing.assert_allclose(result, trial.exact()[name].value, rtol=0, atol=1001 * FP32_TINY)
    np.testing.assert_array_equal(v, trial.exact()["v"].value)


@pytest.mark.parametrize("name", ["bfloat16-l2norm_True-g_exp_True", "gates_wide_line-g_exp_False"])
def test_public_function(layer: Any, name: str) -> None:
    assert layer.public(CASES[name]) == ("passed", "")


def test_real_shapes(jax_layer: Any) -> None:
    own = {case.name for case in cases(OP)}
    real = [case for case in model_cases(OP) if case.name not in own and case.dims["L"] < 99]
    assert real
    assert jax_layer.problems(real) == {}


def test_copies_keep_every_bit(layer: Any) -> None:
    patterns = np.arange(2**16, dtype=np.uint16).reshape(-1, 64)
    conv_out = jax.lax.bitcast_convert_type(jnp.asarray(patterns), jnp.bfloat16)
    gates, heads = jnp.zeros((len(conv_out), 2)), jnp.zeros(2)
    attrs = {"num_k_heads": 1, "head_k_dim": 16, "head_v_dim": 16, "l2norm": False}
    q, k, v, _, _ = layer.function(conv_out, gates, gates, heads, heads, **attrs)
    copied = np.concatenate([np.asarray(part).reshape(len(conv_out), -1) for part in (q, k, v)], axis=1)
    nan = np.isnan(np.asarray(conv_out).astype(np.float32))
    assert np.isnan(copied[nan].astype(np.float32)).all()
    if layer.name == "pallas":  # the interpreter makes a signalling NaN quiet
        copied, patterns = copied[~nan], patterns[~nan]
    np.testing.assert_array_equal(copied.view(np.uint16), patterns)


def test_eps_below_float32(jax_layer: Any) -> None:
    conv_out, *gates = random_arguments(3)
    q, _k, *_ = jax_layer.function(conv_out.at[1].set(0), *gates, **HEADS, l2norm_eps=1e-60)
    assert not q[1].any()
    np.testing.assert_allclose(jnp.linalg.norm(q[0], axis=-1), 1, rtol=1e-6)


def test_no_value_heads(jax_layer: Any) -> None:
    conv_out, *_ = random_arguments(3)
    none = jnp.zeros((3, 0))
    _q, k, v, g, beta = jax_layer.function(conv_out[:, :64], none, none, none[0], none[0], **HEADS)
    assert (v.shape, g.shape, beta.shape) == ((3, 0, 8), (3, 0), (3, 0))
    np.testing.assert_allclose(jnp.linalg.norm(k, axis=-1), 1, rtol=1e-6)


def test_no_value_heads_is_declined(pallas_layer: Any) -> None:
    conv_out, *_ = random_arguments(3)
    none = jnp.zeros((3, 0))
    with pytest.raises(Unsupported, match="HV=0: a kernel cannot have an empty output"):
        pallas_layer.function(conv_out[:, :64], none, none, none[0], none[0], **HEADS)


def test_decay_where_softplus_underflows(layer: Any) -> None:
    conv_out, _, b, _, _ = random_arguments(3)
    a, A_log = jnp.full((3, HEADS_V), -88.0), jnp.full(HEADS_V, 3.0)
    _, _, _, g, _ = layer.function(conv_out, a, b, A_log, jnp.zeros(HEADS_V), **HEADS)
    np.testing.assert_allclose(g, -np.exp(-85.0), rtol=1e-4)


def test_vmap(layer: Any) -> None:
    conv_out, a, b, A_log, dt_bias = random_arguments(3, 5)
    op = partial(layer.function, **HEADS)
    batched = jax.vmap(op, in_axes=(0, 0, 0, None, None))(conv_out, a, b, A_log, dt_bias)
    for i in range(3):
        each = op(*(np.asarray(x)[i] for x in (conv_out, a, b)), A_log, dt_bias)
        for result, want in zip(batched, each, strict=True):
            np.testing.assert_allclose(result[i], want, rtol=1e-6, atol=1e-30)


def test_sharded_rows_stay_where_they_are(jax_layer: Any, mesh: Mesh) -> None:
    rows, whole = NamedSharding(mesh, PartitionSpec("d")), NamedSharding(mesh, PartitionSpec())
    arguments = [np.asarray(x) for x in random_arguments(8)]
    placed = [jax.device_put(x, rows if x.ndim == 2 else whole) for x in arguments]
    op = partial(jax_layer.function, **HEADS)
    compiled = jax.jit(op).lower(*placed).compile()
    program = compiled.as_text() or ""
    assert "ENTRY" in program
    assert not any(name in program for name in ("all-gather", "all-reduce", "all-to-all"))
    results = compiled(*placed)
    assert all(result.sharding.is_equivalent_to(rows, result.ndim) for result in results)
    on_one = [jax.device_put(x, jax.devices("cpu")[0]) for x in arguments]
    for result, want in zip(results, op(*on_one), strict=True):
        np.testing.assert_allclose(result, want, rtol=1e-6)


def test_under_shard_map(pallas_layer: Any, mesh: Mesh) -> None:
    rows, whole = PartitionSpec("d"), PartitionSpec()
    specs = (rows, rows, rows, whole, whole)
    arguments = [np.asarray(x) for x in random_arguments(8)]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs, strict=True)]
    op = partial(pallas_layer.function, **HEADS)
    mapped = jax.shard_map(op, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    results = jax.jit(mapped)(*placed)
    assert all(result.sharding.is_equivalent_to(NamedSharding(mesh, rows), result.ndim) for result in results)
    on_one = [jax.device_put(x, jax.devices("cpu")[0]) for x in arguments]
    for result, want in zip(results, op(*on_one), strict=True):
        np.testing.assert_allclose(result, want, rtol=1e-6)


@pytest.mark.parametrize("output_g_exp", [False, True])
def test_gradients(jax_layer: Any, output_g_exp: bool) -> None:
    op = jax.jit(partial(jax_layer.function, **HEADS, l2norm_eps=1e-2, output_g_exp=output_g_exp))
    check_grads(op, random_arguments(2), order=1, modes=("rev",), rtol=2e-2, atol=2e-2, eps=1e-2)


def test_gradients_at_the_ends_of_the_line(jax_layer: Any) -> None:
    conv_out, _, _, A_log, dt_bias = random_arguments(5)
    ends = jnp.array([-200.0, -50.0, 0.0, 50.0, 200.0])
    gates = jnp.broadcast_to(ends[:, None], (5, HEADS_V))

    @jax.jit
    @partial(jax.grad, argnums=(0, 1, 2))
    def gradients(conv_out: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        zeros = jnp.zeros_like(A_log), jnp.zeros_like(dt_bias)
        q, _, _, g, beta = jax_layer.function(conv_out, a, b, *zeros, **HEADS)
        return q.sum() + g.sum() + beta.sum()

    for_conv, for_a, for_b = gradients(jnp.zeros_like(conv_out), gates, gates)
    sigmoid = 1 / (1 + np.exp(-np.asarray(gates, np.float64)))
    np.testing.assert_allclose(for_conv[:, :32], 1e3, rtol=1e-6)  # 1 / sqrt(eps)
    np.testing.assert_allclose(for_a, -sigmoid, rtol=1e-5, atol=FP32_TINY)
    np.testing.assert_allclose(for_b, sigmoid * (1 - sigmoid), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("heads", "size", "size_v", "heads_v", "l2norm"),
    [
        (5, 24, 40, 7, True),  # nothing a power of two, masked everywhere
        (16, 128, 16, 3, True),  # more shares of q and k than of v
        (1, 16, 128, 20, False),  # more shares of v than of q and k
    ],
)
def test_gpu_tiles(
    pallas_layer: Any, gpu_tiles: None, heads: int, size: int, size_v: int, heads_v: int, l2norm: bool
) -> None:
    dims = {"L": 21, "HV": heads_v}
    attrs = {"num_k_heads": heads, "head_k_dim": size, "head_v_dim": size_v, "l2norm": l2norm}
    assert pallas_layer.problem(Trial(OP, Case("gpu_tiles", dims, attrs, {"T": "bfloat16"}), seed=0)) is None


def test_many_interpreted_programs(pallas_layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_layer.module, "_CPU_TILE_ROWS", 8)
    case = Case("many_programs", {"L": 29, "HV": 4}, HEADS, {"T": "bfloat16"})
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("length", "heads", "size", "size_v", "heads_v"), [(300_000, 16, 128, 128, 32), (9, 3, 24, 40, 6)]
)
@pytest.mark.parametrize("l2norm", [True, False])
def test_lowers_to_one_kernel(
    pallas_layer: Any,
    triton_kernels: Any,
    length: int,
    heads: int,
    size: int,
    size_v: int,
    heads_v: int,
    l2norm: bool,
    dtype: str,
) -> None:
    gates, per_head = jax.ShapeDtypeStruct((length, heads_v), dtype), jax.ShapeDtypeStruct((heads_v,), "float32")
    conv_out = jax.ShapeDtypeStruct((length, 2 * heads * size + heads_v * size_v), dtype)
    op = partial(pallas_layer.function, num_k_heads=heads, head_k_dim=size, head_v_dim=size_v, l2norm=l2norm)
    assert triton_kernels(op, conv_out, gates, gates, per_head, per_head) == 1
