"""`gdn_conv_prep` in Pallas: right on the cases, interpreted with a CPU's and with a GPU's tiles, and it lowers."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, PartitionSpec

from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import registry
from polyfuse.reference.pallas import gdn_post_conv as tiles
from polyfuse.reference.pallas.gdn_conv_prep import gdn_conv_prep
from polyfuse.spec import Unsupported

OP = "gdn_conv_prep"
# Half a second each, most of it compiling: `polyfuse conformance` runs them all.
CASES = [case for case in cases(OP) if case.repeat == 1][::4]
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
def test_cases(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU's tiles alone: tracing those of a GPU as well takes longer.
    monkeypatch.setattr(tiles.lax, "platform_dependent", lambda *operands, cpu, **_: cpu(*operands))
    assert problem(Trial(OP, case, seed=0)) is None


def test_public_function() -> None:
    [case] = [case for case in cases(OP) if case.name == "width_3-bias-initial_state-int64"]
    assert Trial(OP, case, seed=0).on(registry().get("pallas")) == ("passed", "")


@pytest.mark.parametrize(
    ("heads", "size", "size_v", "heads_v", "width", "l2norm"),
    [
        (5, 24, 40, 7, 3, True),  # nothing a power of two, masked everywhere
        (16, 128, 16, 3, 4, True),  # more shares of q and k than of v
        (1, 16, 128, 20, 2, False),  # more shares of v than of q and k
    ],
)
def test_gpu_tiles(
    heads: int, size: int, size_v: int, heads_v: int, width: int, l2norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dims = {"L": 25, "HV": heads_v, "W": width, "N": 9, "S": 8}
    attrs = {"num_k_heads": heads, "head_k_dim": size, "head_v_dim": size_v, "l2norm": l2norm}
    trial = Trial(OP, Case("gpu_tiles", **PACKED | {"dims": dims, "attrs": attrs}), seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(tiles.lax, "platform_dependent", lambda *operands, cuda, **_: cuda(*operands, interpret=True))
        assert problem(trial) is None


def test_many_interpreted_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_CPU_TILE_ROWS", 8)
    dims = PACKED["dims"] | {"L": 29}
    assert problem(Trial(OP, Case("many_programs", **PACKED | {"dims": dims}), seed=0)) is None


@pytest.mark.parametrize("cu_seqlens", [[2, 2, 5, 5, 9, 10, 10, 12, 12], [23] * 9, [0] * 9])
def test_rows_outside_all_sequences(cu_seqlens: list[int]) -> None:
    trial = Trial(OP, Case("outside", **PACKED), seed=0)
    trial.inputs()[0]["cu_seqlens"] = np.array(cu_seqlens, np.int32)
    assert problem(trial) is None


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


def test_under_shard_map() -> None:
    """Each device has whole sequences."""
    mesh, rows, whole = Mesh(np.array(jax.devices("cpu")[:4]), ("rows",)), PartitionSpec("rows"), PartitionSpec()
    specs = (rows, whole, rows, rows, whole, whole, whole, rows)
    *arguments, state = random_arguments(12)
    arguments += [jnp.concatenate([state, -state, 2 * state, 0 * state])]
    mapped = jax.shard_map(op, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    together = op(*arguments, cu_seqlens=jnp.array([0, 3, 6, 9, 12]))
    for result, want in zip(jax.jit(mapped)(*arguments), together, strict=True):
        np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-6)


def test_no_value_heads_is_declined() -> None:
    x, weight, *_ = random_arguments(3)
    none = jnp.zeros((3, 0))
    with pytest.raises(Unsupported, match="HV=0: a kernel cannot have an empty output"):
        gdn_conv_prep(x[:, :64], weight[:64], none, none, none[0], none[0], **HEADS)


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
    length: int, heads: int, size: int, size_v: int, heads_v: int, width: int, packed: bool, dtype: str
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
    assert triton_kernels(partial(gdn_conv_prep, **attrs), arrays) == 1


def triton_kernels(op: Any, arrays: dict[str, Any]) -> int:
    """Triton kernels in the program for CUDA."""
    targets = ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")
    checks = [export.DisabledSafetyCheck.custom_call(target) for target in targets]
    program = export.export(jax.jit(op), platforms=["cuda"], disabled_checks=checks)(**arrays).mlir_module()
    return sum(program.count(f"@{target}") for target in targets)
