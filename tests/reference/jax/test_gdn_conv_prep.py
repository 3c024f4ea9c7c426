"""`gdn_conv_prep` in jax.numpy: right on every case, and under jit, vmap, grad and sharding."""

from functools import cache, partial
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
from polyfuse.reference.jax.gdn_conv_prep import gdn_conv_prep

OP = "gdn_conv_prep"
CASES = [case for case in cases(OP) if case.repeat == 1]
HEADS = {"num_k_heads": 2, "head_k_dim": 16, "head_v_dim": 8, "output_final_state": True}
HEADS_V = 4
CHANNELS = 2 * 2 * 16 + HEADS_V * 8
PACKED: dict[str, Any] = {
    "dims": {"L": 23, "HV": HEADS_V, "W": 4, "N": 9, "S": 8},
    "attrs": HEADS,
    "present": ("bias", "initial_state", "cu_seqlens"),
    "fill": {"cu_seqlens": "cu_seqlens"},
}

# Compiling is most of the time here.
FAST = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


@cache
def compiled(**attrs: Any) -> Any:
    return jax.jit(partial(gdn_conv_prep, **attrs), compiler_options=FAST)


def run(values: dict[str, Any]) -> Any:
    arrays = {k: jnp.asarray(v) for k, v in values.items() if isinstance(v, np.ndarray)}
    attrs = {k: v for k, v in values.items() if v is not None and k not in arrays}
    return compiled(**attrs)(**arrays)


def problem(trial: Trial) -> str | None:
    """What is wrong with the result of a case."""
    values, call = trial.inputs()
    return trial.check(run(values), call)


def random_arguments(length: int) -> tuple[jax.Array, ...]:
    """x, weight, a, b, A_log, dt_bias, bias, initial_state of one sequence."""
    rng = np.random.default_rng(5)
    gates, heads, channels = (length, HEADS_V), (HEADS_V,), (CHANNELS,)
    shapes = [(length, CHANNELS), (CHANNELS, 4), gates, gates, heads, heads, channels, (1, CHANNELS, 3)]
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def op(*arrays: jax.Array, **attrs: Any) -> Any:
    """On what `random_arguments` gives."""
    *required, bias, state = arrays
    return gdn_conv_prep(*required, bias=bias, initial_state=state, **HEADS | attrs)


compiled_op = jax.jit(op, compiler_options=FAST)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: Case) -> None:
    assert problem(Trial(OP, case, seed=0)) is None


@pytest.mark.parametrize("name", ["bfloat16-l2norm_True-g_exp_True", "width_3-bias-initial_state-int64"])
def test_public_function(name: str) -> None:
    [case] = [case for case in CASES if case.name == name]
    assert Trial(OP, case, seed=0).on(registry().get("jax")) == ("passed", "")


def test_real_shapes() -> None:
    own = {case.name for case in CASES}
    cases = [case for case in all_cases(OP) if case.name not in own and case.repeat == 1 and case.dims["L"] < 99]
    found = {case.name: problem(Trial(OP, case, seed=0)) for case in cases}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("cu_seqlens", [[2, 2, 5, 5, 9, 10, 10, 12, 12], [23] * 9, [0] * 9])
def test_rows_outside_all_sequences(cu_seqlens: list[int]) -> None:
    trial = Trial(OP, Case("outside", **PACKED), seed=0)
    trial.inputs()[0]["cu_seqlens"] = np.array(cu_seqlens, np.int32)
    assert problem(trial) is None


def test_final_state_is_a_copy() -> None:
    """Of every bfloat16, subnormal ones included; a signalling NaN may become a quiet one."""
    patterns = np.arange(2**16, dtype=np.uint16).reshape(64, 1024).view(jnp.bfloat16)
    x, state = patterns[3:], np.stack([patterns[i : i + 3].T for i in range(61)])  # [61, C], [61, C, 3]
    gates, heads, attrs = jnp.zeros((61, 32)), jnp.zeros(32), dict.fromkeys(("head_k_dim", "head_v_dim"), 16)
    starts = jnp.arange(62)
    *_, last = gdn_conv_prep(
        jnp.asarray(x),
        jnp.zeros((1024, 4)),
        *(gates, gates, heads, heads),
        initial_state=jnp.asarray(state),
        cu_seqlens=starts,
        num_k_heads=16,
        output_final_state=True,
        **attrs,
    )
    want = np.stack([patterns[i + 1 : i + 4].T for i in range(61)])
    nan = np.isnan(want.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(last).view(np.uint16)[~nan], want.view(np.uint16)[~nan])
    assert np.isnan(np.asarray(last)[nan].astype(np.float32)).all()


@pytest.mark.parametrize("cut", [1, 5])
def test_a_sequence_goes_on_from_its_final_state(cut: int) -> None:
    x, weight, a, b, *rest, state = random_arguments(7)
    *whole, last = compiled_op(x, weight, a, b, *rest, state)
    *head, middle = compiled_op(x[:cut], weight, a[:cut], b[:cut], *rest, state)
    *tail, end = compiled_op(x[cut:], weight, a[cut:], b[cut:], *rest, middle)
    np.testing.assert_array_equal(end, last)
    for *parts, want in zip(head, tail, whole, strict=True):
        np.testing.assert_allclose(jnp.concatenate(parts), want, rtol=1e-5, atol=1e-6)


def test_nan_stays_in_its_sequence() -> None:
    values = Trial(OP, Case("packed", **PACKED), seed=0).inputs()[0]
    spoiled = {name: values[name].copy() for name in ("x", "a", "b", "initial_state")}
    for name in ("x", "a", "b"):
        spoiled[name][2:7] = np.nan
    spoiled["initial_state"][2] = np.nan
    clean, results = run(values), run(values | spoiled)
    for result, want in zip(results[:5], clean[:5], strict=True):
        assert jnp.isnan(result[2:7]).all()
        np.testing.assert_array_equal(result[:2], want[:2])
        np.testing.assert_array_equal(result[7:], want[7:])
    others = np.array([0, 1, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(results[5][others], clean[5][others])


def test_vmap() -> None:
    x, weight, a, b, *rest = random_arguments(15)
    stacked = [part.reshape(3, 5, -1) for part in (x, a, b)]
    axes = (0, None, 0, 0, *[None] * len(rest))
    batched = jax.vmap(compiled_op, in_axes=axes)(stacked[0], weight, *stacked[1:], *rest)
    for i in range(3):
        x, a, b = (np.asarray(part)[i] for part in stacked)
        for result, want in zip(batched, compiled_op(x, weight, a, b, *rest), strict=True):
            np.testing.assert_allclose(result[i], want, rtol=1e-5, atol=1e-6)


def test_sharded_rows_meet_only_their_neighbours() -> None:
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("rows",))
    rows, whole = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())
    arguments = [np.asarray(x) for x in random_arguments(16)]
    sharded = (rows, whole, rows, rows, whole, whole, whole, whole)
    placed = [jax.device_put(x, where) for x, where in zip(arguments, sharded, strict=True)]
    program = jax.jit(partial(op, output_final_state=False)).lower(*placed).compile()
    text = program.as_text() or ""
    assert "collective-permute" in text
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all"))
    results = program(*placed)[:5]
    assert all(result.sharding.is_equivalent_to(rows, result.ndim) for result in results)
    on_one = [jax.device_put(x, jax.devices("cpu")[0]) for x in arguments]
    for result, want in zip(results, compiled_op(*on_one)[:5], strict=True):
        np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 1, 1, 4]])
def test_gradients(cu_seqlens: list[int] | None) -> None:
    *arguments, state = random_arguments(5)
    if cu_seqlens:
        state = jnp.concatenate([state, -state, 2 * state])
    starts = cu_seqlens and jnp.array(cu_seqlens)
    differentiated = jax.jit(partial(op, l2norm_eps=1e-2, cu_seqlens=starts))
    check_grads(differentiated, (*arguments, state), order=1, modes=("rev",), rtol=2e-2, atol=2e-2, eps=1e-2)


def test_gradients_at_the_ends_of_the_line() -> None:
    x = jnp.array([-1000.0, -50.0, 0.0, 50.0, 1000.0])[:, None] * jnp.array([0.0, 0.0, 1.0])
    weight, zero = jnp.array([[0.0, 1.0]] * 3), jnp.zeros((5, 1))

    @partial(jax.jit, compiler_options=FAST)
    @jax.grad
    def gradient(x: jax.Array) -> jax.Array:
        attrs = {"num_k_heads": 1, "head_k_dim": 1, "head_v_dim": 1}
        q, _, v, *_ = gdn_conv_prep(x, weight, zero, zero, zero[0], zero[0], **attrs)
        return q.sum() + v.sum()

    result = gradient(x)
    np.testing.assert_allclose(result[:, 2], [0, 0, 0.5, 1, 1], atol=1e-19)
    np.testing.assert_allclose(result[:, 0], 500, rtol=1e-6)  # half of 1 / sqrt(eps)
