"""`gdn_post_conv` in Pallas: right on every case, interpreted with a CPU's and with a GPU's tiles, and it lowers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import registry
from polyfuse.reference.pallas import gdn_post_conv as module
from polyfuse.reference.pallas.gdn_post_conv import gdn_post_conv
from polyfuse.spec import FP32_TINY, Unsupported

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


def test_public_function() -> None:
    [case] = [case for case in CASES if case.name == "bfloat16-l2norm_True-g_exp_True"]
    assert Trial(OP, case, seed=0).on(registry().get("pallas")) == ("passed", "")


@pytest.mark.parametrize(
    ("heads", "size", "size_v", "heads_v", "l2norm"),
    [
        (5, 24, 40, 7, True),  # nothing a power of two, masked everywhere
        (16, 128, 16, 3, True),  # more shares of q and k than of v
        (1, 16, 128, 20, False),  # more shares of v than of q and k
    ],
)
def test_gpu_tiles(
    heads: int, size: int, size_v: int, heads_v: int, l2norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dims = {"L": 21, "HV": heads_v}
    attrs = {"num_k_heads": heads, "head_k_dim": size, "head_v_dim": size_v, "l2norm": l2norm}
    trial = Trial(OP, Case("gpu_tiles", dims, attrs, {"T": "bfloat16"}), seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(module.lax, "platform_dependent", lambda *operands, cuda, **_: cuda(*operands, interpret=True))
        [result] = run_compiled([trial])
    assert trial.check(result, trial.inputs()[1]) is None


def test_many_interpreted_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CPU_TILE_ROWS", 8)
    trial = Trial(OP, Case("many_programs", {"L": 29, "HV": 4}, HEADS, {"T": "bfloat16"}), seed=0)
    [result] = run_compiled([trial])
    assert trial.check(result, trial.inputs()[1]) is None


def test_copies() -> None:
    patterns = np.arange(2**16, dtype=np.uint16).reshape(-1, 64)
    conv_out = jax.lax.bitcast_convert_type(jnp.asarray(patterns), jnp.bfloat16)
    gates, heads = jnp.zeros((len(conv_out), 2)), jnp.zeros(2)
    attrs = {"num_k_heads": 1, "head_k_dim": 16, "head_v_dim": 16, "l2norm": False}
    q, k, v, _, _ = gdn_post_conv(conv_out, gates, gates, heads, heads, **attrs)
    copied = np.concatenate([np.asarray(part).reshape(len(conv_out), -1) for part in (q, k, v)], axis=1)
    nan = np.isnan(np.asarray(conv_out).astype(np.float32))
    np.testing.assert_array_equal(copied.view(np.uint16)[~nan], patterns[~nan])
    # The interpreter makes a signalling NaN quiet.
    assert np.isnan(copied[nan].astype(np.float32)).all()


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


def test_under_shard_map() -> None:
    mesh, rows, whole = Mesh(np.array(jax.devices("cpu")[:4]), ("rows",)), PartitionSpec("rows"), PartitionSpec()
    specs = (rows, rows, rows, whole, whole)
    arguments = [np.asarray(x) for x in random_arguments(8)]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs, strict=True)]
    op = partial(gdn_post_conv, **HEADS)
    mapped = jax.shard_map(op, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    results = jax.jit(mapped)(*placed)
    assert all(result.sharding.is_equivalent_to(NamedSharding(mesh, rows), result.ndim) for result in results)
    on_one = [jax.device_put(x, jax.devices("cpu")[0]) for x in arguments]
    for result, want in zip(results, op(*on_one), strict=True):
        np.testing.assert_allclose(result, want, rtol=1e-6)


def test_no_value_heads_is_declined() -> None:
    conv_out, *_ = random_arguments(3)
    none = jnp.zeros((3, 0))
    with pytest.raises(Unsupported, match="HV=0"):
        gdn_post_conv(conv_out[:, :64], none, none, none[0], none[0], **HEADS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("length", "heads", "size", "size_v", "heads_v"), [(300_000, 16, 128, 128, 32), (9, 3, 24, 40, 6)]
)
@pytest.mark.parametrize("l2norm", [True, False])
def test_lowers_to_one_kernel(
    length: int, heads: int, size: int, size_v: int, heads_v: int, l2norm: bool, dtype: str
) -> None:
    gates, per_head = jax.ShapeDtypeStruct((length, heads_v), dtype), jax.ShapeDtypeStruct((heads_v,), "float32")
    conv_out = jax.ShapeDtypeStruct((length, 2 * heads * size + heads_v * size_v), dtype)
    op = partial(gdn_post_conv, num_k_heads=heads, head_k_dim=size, head_v_dim=size_v, l2norm=l2norm)
    assert triton_kernels(op, conv_out, gates, gates, per_head, per_head) == 1


def triton_kernels(op: Any, *arguments: Any) -> int:
    """Triton kernels in the program for CUDA."""
    targets = ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")
    checks = [export.DisabledSafetyCheck.custom_call(target) for target in targets]
    program = export.export(jax.jit(op), platforms=["cuda"], disabled_checks=checks)(*arguments).mlir_module()
    return sum(program.count(f"@{target}") for target in targets)
