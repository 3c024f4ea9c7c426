"""`gdn_conv_prep` in both JAX layers: right on every case, under jit, vmap, grad and sharding, and lowered."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from polyfuse.conformance import Case, Trial, cases
from polyfuse.conformance.cases import model_cases
from polyfuse.reference.pallas import gdn_post_conv as kernel
from polyfuse.spec import Unsupported
from tests import interleaved

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

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def random_arguments(length: int) -> tuple[jax.Array, ...]:
    """x, weight, a, b, A_log, dt_bias, bias, initial_state of one sequence."""
    rng = np.random.default_rng(5)
    gates, heads, channels = (length, HEADS_V), (HEADS_V,), (CHANNELS,)
    shapes = [(length, CHANNELS), (CHANNELS, 4), gates, gates, heads, heads, channels, (1, CHANNELS, 3)]
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def op(function: Any, *arrays: jax.Array, **attrs: Any) -> Any:
    """On what `random_arguments` gives."""
    *required, bias, state = arrays
    return function(*required, bias=bias, initial_state=state, **HEADS | attrs)


@cache
def compiled_op(function: Any) -> Any:
    return jax.jit(partial(op, function))


def test_cases(layer: Any, part: Any, cpu_tiles: None) -> None:
    # Interpreted they take up to half a second each, most of it compiling: `polyfuse conformance` runs them all.
    assert layer.problems(part(CASES[:: 1 if layer.name == "jax" else 8])) == {}


@pytest.mark.parametrize("name", ["bfloat16-l2norm_True-g_exp_True", "width_3-bias-initial_state-int64"])
def test_public_function(layer: Any, name: str) -> None:
    [case] = [case for case in CASES if case.name == name]
    assert layer.public(case) == ("passed", "")


def test_real_shapes(jax_layer: Any) -> None:
    own = {case.name for case in cases(OP)}
    real = [case for case in model_cases(OP) if case.name not in own and case.dims["L"] < 99]
    assert real
    assert jax_layer.problems(real) == {}


@pytest.mark.parametrize("cu_seqlens", [[2, 2, 5, 5, 9, 10, 10, 12, 12], [23] * 9, [0] * 9])
def test_rows_outside_all_sequences(layer: Any, cu_seqlens: list[int]) -> None:
    trial = Trial(OP, Case("outside", **PACKED), seed=0)
    trial.inputs()[0]["cu_seqlens"] = np.array(cu_seqlens, np.int32)
    assert layer.problem(trial) is None


def test_final_state_is_a_copy(jax_layer: Any) -> None:
    """Of every bfloat16, subnormal ones included; a signalling NaN may become a quiet one."""
    patterns = np.arange(2**16, dtype=np.uint16).reshape(64, 1024).view(jnp.bfloat16)
    x, state = patterns[3:], np.stack([patterns[i : i + 3].T for i in range(61)])  # [61, C], [61, C, 3]
    gates, heads, attrs = jnp.zeros((61, 32)), jnp.zeros(32), dict.fromkeys(("head_k_dim", "head_v_dim"), 16)
    starts = jnp.arange(62)
    *_, last = jax_layer.function(
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


@pytest.mark.parametrize("cut", [1, 6])
def test_a_sequence_goes_on_from_its_final_state(layer: Any, cpu_tiles: None, cut: int) -> None:
    run = compiled_op(layer.function)
    x, weight, a, b, *rest, state = random_arguments(7)
    *whole, last = run(x, weight, a, b, *rest, state)
    *head, middle = run(x[:cut], weight, a[:cut], b[:cut], *rest, state)
    *tail, end = run(x[cut:], weight, a[cut:], b[cut:], *rest, middle)
    np.testing.assert_array_equal(end, last)
    for *parts, want in zip(head, tail, whole, strict=True):
        np.testing.assert_allclose(jnp.concatenate(parts), want, rtol=1e-5, atol=1e-6)


def test_nan_stays_in_its_sequence(layer: Any) -> None:
    values = Trial(OP, Case("packed", **PACKED), seed=0).inputs()[0]
    spoiled = {name: values[name].copy() for name in ("x", "a", "b", "initial_state")}
    for name in ("x", "a", "b"):
        spoiled[name][2:7] = np.nan
    spoiled["initial_state"][2] = np.nan
    clean, results = layer.call(values), layer.call(values | spoiled)
    for result, want in zip(results[:5], clean[:5], strict=True):
        assert jnp.isnan(result[2:7]).all()
        np.testing.assert_array_equal(result[:2], want[:2])
        np.testing.assert_array_equal(result[7:], want[7:])
    others = np.array([0, 1, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(results[5][others], clean[5][others])


@pytest.mark.parametrize("case", interleaved.CASES[::8], ids=lambda case: case.name)
def test_interleaved_is_the_op_on_columns_in_order(layer: Any, cpu_tiles: None, bits: Any, case: Case) -> None:
    values = Trial(OP, case, seed=0).inputs()[0]
    assert bits(layer.call(values)) == bits(layer.call(interleaved.in_order(values)))


def test_gradients_of_interleaved_columns(jax_layer: Any) -> None:
    """Those of the columns in order, and zeros for z, whatever it holds."""
    values = Trial(OP, interleaved.CASES[0], seed=0).inputs()[0]
    found = []
    for given in (values, interleaved.in_order(values)):
        arrays = {name: jnp.asarray(given[name], jnp.float32) for name in ("x", "a", "b")}
        options = {name: value for name, value in given.items() if name not in arrays}

        def total(arrays: dict[str, jax.Array], options: dict[str, Any] = options) -> jax.Array:
            return sum(part.sum() for part in jax_layer.function(**arrays, **options))

        found.append({name: np.asarray(part) for name, part in jax.grad(total)(arrays).items()})
    mine, wanted = found
    of_z = len(values["A_log"]) // 2 * values["head_v_dim"]
    assert not mine["x"].reshape(len(values["x"]), 2, -1)[:, :, -of_z:].any()
    ordered = interleaved.in_order(values | mine)
    for name, want in wanted.items():
        np.testing.assert_allclose(ordered[name], want, rtol=1e-5, atol=1e-6)


def test_vmap(layer: Any) -> None:
    run = compiled_op(layer.function)
    x, weight, a, b, *rest = random_arguments(15)
    stacked = [part.reshape(3, 5, -1) for part in (x, a, b)]
    axes = (0, None, 0, 0, *[None] * len(rest))
    batched = jax.vmap(run, in_axes=axes)(stacked[0], weight, *stacked[1:], *rest)
    for i in range(3):
        x, a, b = (np.asarray(part)[i] for part in stacked)
        for result, want in zip(batched, run(x, weight, a, b, *rest), strict=True):
            np.testing.assert_allclose(result[i], want, rtol=1e-5, atol=1e-6)


def test_sharded_rows_meet_only_their_neighbours(jax_layer: Any, mesh: Mesh) -> None:
    rows, whole = NamedSharding(mesh, PartitionSpec("d")), NamedSharding(mesh, PartitionSpec())
    arguments = [np.asarray(x) for x in random_arguments(16)]
    sharded = (rows, whole, rows, rows, whole, whole, whole, whole)
    placed = [jax.device_put(x, where) for x, where in zip(arguments, sharded, strict=True)]
    program = jax.jit(partial(op, jax_layer.function, output_final_state=False)).lower(*placed).compile()
    text = program.as_text() or ""
    assert "collective-permute" in text
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all"))
    results = program(*placed)[:5]
    assert all(result.sharding.is_equivalent_to(rows, result.ndim) for result in results)
    on_one = [jax.device_put(x, jax.devices("cpu")[0]) for x in arguments]
    for result, want in zip(results, compiled_op(jax_layer.function)(*on_one)[:5], strict=True):
        np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-6)


def test_under_shard_map(pallas_layer: Any, mesh: Mesh) -> None:
    """Each device has whole sequences."""
    rows, whole = PartitionSpec("d"), PartitionSpec()
    specs = (rows, whole, rows, rows, whole, whole, whole, rows)
    *arguments, state = random_arguments(12)
    arguments += [jnp.concatenate([state, -state, 2 * state, 0 * state])]
    run = partial(op, pallas_layer.function)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    together = run(*arguments, cu_seqlens=jnp.array([0, 3, 6, 9, 12]))
    for result, want in zip(jax.jit(mapped)(*arguments), together, strict=True):
        np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 1, 1, 4]])
def test_gradients(jax_layer: Any, cu_seqlens: list[int] | None) -> None:
    *arguments, state = random_arguments(5)
    if cu_seqlens:
        state = jnp.concatenate([state, -state, 2 * state])
    starts = cu_seqlens and jnp.array(cu_seqlens)
    differentiated = jax.jit(partial(op, jax_layer.function, l2norm_eps=1e-2, cu_seqlens=starts))
    check_grads(differentiated, (*arguments, state), order=1, modes=("rev",), rtol=2e-2, atol=2e-2, eps=1e-2)


def test_gradients_at_the_ends_of_the_line(jax_layer: Any) -> None:
    x = jnp.array([-1000.0, -50.0, 0.0, 50.0, 1000.0])[:, None] * jnp.array([0.0, 0.0, 1.0])
    weight, zero = jnp.array([[0.0, 1.0]] * 3), jnp.zeros((5, 1))

    @jax.jit
    @jax.grad
    def gradient(x: jax.Array) -> jax.Array:
        attrs = {"num_k_heads": 1, "head_k_dim": 1, "head_v_dim": 1}
        q, _, v, *_ = jax_layer.function(x, weight, zero, zero, zero[0], zero[0], **attrs)
        return q.sum() + v.sum()

    result = gradient(x)
    np.testing.assert_allclose(result[:, 2], [0, 0, 0.5, 1, 1], atol=1e-19)
    np.testing.assert_allclose(result[:, 0], 500, rtol=1e-6)  # half of 1 / sqrt(eps)


@pytest.mark.parametrize(
    ("heads", "size", "size_v", "heads_v", "width", "l2norm"),
    [
        (5, 24, 40, 7, 3, True),  # nothing a power of two, masked everywhere
        (16, 128, 16, 3, 4, True),  # more shares of q and k than of v
        (1, 16, 128, 20, 2, False),  # more shares of v than of q and k
    ],
)
def test_gpu_tiles(
    pallas_layer: Any, gpu_tiles: None, heads: int, size: int, size_v: int, heads_v: int, width: int, l2norm: bool
) -> None:
    dims = {"L": 25, "HV": heads_v, "W": width, "N": 9, "S": 8}
    attrs = {"num_k_heads": heads, "head_k_dim": size, "head_v_dim": size_v, "l2norm": l2norm}
    assert pallas_layer.problem(Trial(OP, Case("gpu_tiles", **PACKED | {"dims": dims, "attrs": attrs}), seed=0)) is None


def test_gpu_tiles_of_interleaved_columns(pallas_layer: Any, gpu_tiles: None) -> None:
    attrs = {"num_k_heads": 3, "head_k_dim": 24, "head_v_dim": 40, "interleaved": True}
    dims = {"L": 25, "HV": 9, "W": 4, "N": 9, "S": 8}
    assert pallas_layer.problem(Trial(OP, Case("gpu_tiles", **PACKED | {"dims": dims, "attrs": attrs}), seed=0)) is None


def test_interleaved_lowers_to_one_kernel(pallas_layer: Any, triton_kernels: Any) -> None:
    channels, gates = 2 * 16 * 128 + 32 * 128, jax.ShapeDtypeStruct((256, 16, 2), "bfloat16")
    shapes = {"x": (256, channels + 32 * 128), "weight": (channels, 4)}
    arrays = {name: jax.ShapeDtypeStruct(shape, "bfloat16") for name, shape in shapes.items()}
    arrays |= dict.fromkeys(("a", "b"), gates)
    arrays |= dict.fromkeys(("A_log", "dt_bias"), jax.ShapeDtypeStruct((32,), "float32"))
    attrs = {"num_k_heads": 16, "head_k_dim": 128, "head_v_dim": 128, "interleaved": True}
    assert triton_kernels(partial(pallas_layer.function, **attrs), **arrays) == 1


def test_many_interpreted_programs(pallas_layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_CPU_TILE_ROWS", 8)
    dims = PACKED["dims"] | {"L": 29}
    assert pallas_layer.problem(Trial(OP, Case("many_programs", **PACKED | {"dims": dims}), seed=0)) is None


def test_no_value_heads_is_declined(pallas_layer: Any) -> None:
    x, weight, *_ = random_arguments(3)
    none = jnp.zeros((3, 0))
    with pytest.raises(Unsupported, match="HV=0: a kernel cannot have an empty output"):
        pallas_layer.function(x[:, :64], weight[:64], none, none, none[0], none[0], **HEADS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("length", "heads", "size", "size_v", "heads_v", "width"),
    [
        (300_000, 16, 128, 128, 32, 4),  # Qwen3.5-35B-A3B, Qwen3-Next-80B-A3B
        (256, 16, 128, 128, 64, 4),  # Qwen3.5-397B-A17B
        (9, 3, 24, 40, 6, 3),
    ],
)
def test_lowers_to_one_kernel(
    pallas_layer: Any,
    triton_kernels: Any,
    length: int,
    heads: int,
    size: int,
    size_v: int,
    heads_v: int,
    width: int,
    packed: bool,
    dtype: str,
) -> None:
    channels = 2 * heads * size + heads_v * size_v
    shapes: dict[str, tuple[int, ...]] = {
        "x": (length, channels),
        "weight": (channels, width),
        "a": (length, heads_v),
        "b": (length, heads_v),
    }
    if packed:
        shapes |= {"bias": (channels,), "initial_state": (256, channels, width - 1)}
    arrays = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    arrays |= dict.fromkeys(("A_log", "dt_bias"), jax.ShapeDtypeStruct((heads_v,), "float32"))
    if packed:
        arrays["cu_seqlens"] = jax.ShapeDtypeStruct((257,), "int32")
    attrs = {"num_k_heads": heads, "head_k_dim": size, "head_v_dim": size_v, "output_final_state": packed}
    assert triton_kernels(partial(pallas_layer.function, **attrs), **arrays) == 1
