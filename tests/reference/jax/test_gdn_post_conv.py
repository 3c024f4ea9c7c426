"""`gdn_post_conv` in jax.numpy: right on every case, and under jit, vmap, grad and sharding."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from polyfuse.conformance import Case, Trial, cases
from polyfuse.conformance.cases import all_cases
from polyfuse.dispatch import registry
from polyfuse.reference.jax.gdn_post_conv import gdn_post_conv
from polyfuse.spec import FP32_TINY

OP = "gdn_post_conv"
SUBNORMAL = [case for case in cases(OP) if case.fill.get("conv_out") == "subnormal"]
CASES = [case for case in cases(OP) if case.repeat == 1 and case not in SUBNORMAL]
HEADS = {"num_k_heads": 2, "head_k_dim": 16, "head_v_dim": 8}
HEADS_V = 4
WIDTH = 2 * 2 * 16 + HEADS_V * 8

# Compiling is most of the time here.
FAST = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def run_compiled(trials: list[Trial]) -> list[Any]:
    """Each case's results; all cases are one compiled function."""
    arrays = [{k: jnp.asarray(v) for k, v in t.inputs()[0].items() if isinstance(v, np.ndarray)} for t in trials]
    static = [{k: v for k, v in t.inputs()[0].items() if not isinstance(v, np.ndarray)} for t in trials]

    @partial(jax.jit, compiler_options=FAST)
    def every(arrays: list[dict[str, Any]]) -> list[Any]:
        return [gdn_post_conv(**a, **s) for a, s in zip(arrays, static, strict=True)]

    return every(arrays)


def problems(cases: list[Case]) -> dict[str, str]:
    """What is wrong with each wrong case's result."""
    trials = [Trial(OP, case, seed=0) for case in cases]
    found = {t.case.name: t.check(out, t.inputs()[1]) for t, out in zip(trials, run_compiled(trials), strict=True)}
    return {name: problem for name, problem in found.items() if problem}


def random_arguments(*lead: int) -> tuple[jax.Array, ...]:
    """conv_out, a, b, A_log, dt_bias."""
    rng = np.random.default_rng(5)
    shapes = [(*lead, WIDTH), (*lead, HEADS_V), (*lead, HEADS_V), (HEADS_V,), (HEADS_V,)]
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def bits(results: Any) -> list[bytes]:
    return [np.asarray(result).tobytes() for result in results]


@pytest.mark.parametrize("part", range(4))
def test_cases(part: int) -> None:
    assert problems(CASES[part::4]) == {}


@pytest.mark.parametrize("case", SUBNORMAL, ids=lambda case: case.name)
def test_float32_subnormals_may_be_flushed(case: Case) -> None:
    trial = Trial(OP, case, seed=0)
    [(q, k, v, *_)] = run_compiled([trial])
    # The norm of such a vector is sqrt(eps), 1e-3.
    for name, result in (("q", q), ("k", k)):
        np.testing.assert_allclose(result, trial.exact()[name].value, rtol=0, atol=1001 * FP32_TINY)
    np.testing.assert_array_equal(v, trial.exact()["v"].value)


@pytest.mark.parametrize("name", ["bfloat16-l2norm_True-g_exp_True", "gates_wide_line-g_exp_False"])
def test_public_function(name: str) -> None:
    [case] = [case for case in CASES if case.name == name]
    assert Trial(OP, case, seed=0).on(registry().get("jax")) == ("passed", "")


def test_real_shapes() -> None:
    cases = [case for case in all_cases(OP) if case.name not in {c.name for c in cases(OP)} and case.dims["L"] < 99]
    assert cases
    assert problems(cases) == {}


def test_copies_keep_every_bit() -> None:
    patterns = jnp.arange(2**16, dtype=jnp.uint16).reshape(-1, 64)
    conv_out = jax.lax.bitcast_convert_type(patterns, jnp.bfloat16)
    gates, heads = jnp.zeros((len(conv_out), 2)), jnp.zeros(2)
    q, k, v, _, _ = gdn_post_conv(
        conv_out, gates, gates, heads, heads, num_k_heads=1, head_k_dim=16, head_v_dim=16, l2norm=False
    )
    copied = np.concatenate([np.asarray(part).reshape(len(conv_out), -1) for part in (q, k, v)], axis=1)
    np.testing.assert_array_equal(copied.view(np.uint16), patterns)


def test_eps_below_float32() -> None:
    conv_out, *gates = random_arguments(3)
    q, _k, *_ = gdn_post_conv(conv_out.at[1].set(0), *gates, **HEADS, l2norm_eps=1e-60)
    assert not q[1].any()
    np.testing.assert_allclose(jnp.linalg.norm(q[0], axis=-1), 1, rtol=1e-6)


def test_no_value_heads() -> None:
    conv_out, *_ = random_arguments(3)
    none = jnp.zeros((3, 0))
    _q, k, v, g, beta = gdn_post_conv(conv_out[:, :64], none, none, none[0], none[0], **HEADS)
    assert (v.shape, g.shape, beta.shape) == ((3, 0, 8), (3, 0), (3, 0))
    np.testing.assert_allclose(jnp.linalg.norm(k, axis=-1), 1, rtol=1e-6)


def test_decay_where_softplus_underflows() -> None:
    conv_out, _, b, _, _ = random_arguments(3)
    a, A_log = jnp.full((3, HEADS_V), -88.0), jnp.full(HEADS_V, 3.0)
    _, _, _, g, _ = gdn_post_conv(conv_out, a, b, A_log, jnp.zeros(HEADS_V), **HEADS)
    np.testing.assert_allclose(g, -np.exp(-85.0), rtol=1e-4)


def test_vmap() -> None:
    conv_out, a, b, A_log, dt_bias = random_arguments(3, 5)
    op = partial(gdn_post_conv, **HEADS)
    batched = jax.vmap(op, in_axes=(0, 0, 0, None, None))(conv_out, a, b, A_log, dt_bias)
    for i in range(3):
        each = op(*(np.asarray(x)[i] for x in (conv_out, a, b)), A_log, dt_bias)
        for result, want in zip(batched, each, strict=True):
            np.testing.assert_allclose(result[i], want, rtol=1e-6, atol=1e-30)


def test_sharded_rows_stay_where_they_are() -> None:
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("rows",))
    rows, whole = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())
    arguments = [np.asarray(x) for x in random_arguments(8)]
    placed = [jax.device_put(x, rows if x.ndim == 2 else whole) for x in arguments]
    compiled = jax.jit(partial(gdn_post_conv, **HEADS)).lower(*placed).compile()
    program = compiled.as_text() or ""
    assert "ENTRY" in program
    assert not any(name in program for name in ("all-gather", "all-reduce", "all-to-all"))
    results = compiled(*placed)
    assert all(result.sharding.is_equivalent_to(rows, result.ndim) for result in results)
    on_one = [jax.device_put(x, jax.devices("cpu")[0]) for x in arguments]
    for result, want in zip(results, gdn_post_conv(*on_one, **HEADS), strict=True):
        np.testing.assert_allclose(result, want, rtol=1e-6)


@pytest.mark.parametrize("output_g_exp", [False, True])
def test_gradients(output_g_exp: bool) -> None:
    op = jax.jit(partial(gdn_post_conv, **HEADS, l2norm_eps=1e-2, output_g_exp=output_g_exp))
    check_grads(op, random_arguments(2), order=1, modes=("rev",), rtol=2e-2, atol=2e-2, eps=1e-2)


def test_gradients_at_the_ends_of_the_line() -> None:
    conv_out, _, _, A_log, dt_bias = random_arguments(5)
    ends = jnp.array([-200.0, -50.0, 0.0, 50.0, 200.0])
    gates = jnp.broadcast_to(ends[:, None], (5, HEADS_V))

    @partial(jax.jit, compiler_options=FAST)
    @partial(jax.grad, argnums=(0, 1, 2))
    def gradients(conv_out: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        q, _, _, g, beta = gdn_post_conv(conv_out, a, b, jnp.zeros_like(A_log), jnp.zeros_like(dt_bias), **HEADS)
        return q.sum() + g.sum() + beta.sum()

    for_conv, for_a, for_b = gradients(jnp.zeros_like(conv_out), gates, gates)
    sigmoid = 1 / (1 + np.exp(-np.asarray(gates, np.float64)))
    np.testing.assert_allclose(for_conv[:, :32], 1e3, rtol=1e-6)  # 1 / sqrt(eps)
    np.testing.assert_allclose(for_a, -sigmoid, rtol=1e-5, atol=FP32_TINY)
    np.testing.assert_allclose(for_b, sigmoid * (1 - sigmoid), rtol=1e-5, atol=1e-7)
