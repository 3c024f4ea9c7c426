"""`silu_mul_block_quant` in Pallas: right on every case, interpreted with a CPU's and a GPU's tiles, and it lowers."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import registry
from polyfuse.reference.pallas import silu_mul_block_quant as module
from polyfuse.reference.pallas.silu_mul_block_quant import silu_mul_block_quant
from polyfuse.spec.silu_mul_block_quant import QMAX

OP = "silu_mul_block_quant"
CASES = {case.name: case for case in cases(OP) if case.repeat == 1}
FAMILIES = sorted({re.split("[-_]", name)[0] for name in CASES})

# Compiling is most of the time here.
FAST = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def problems(cases: list[Case], **compiler_options: Any) -> dict[str, str]:
    """What is wrong with each wrong case's result; all cases are one compiled function."""
    trials = [Trial(OP, case, seed=0) for case in cases]
    arrays = [{k: jnp.asarray(v) for k, v in t.inputs()[0].items() if isinstance(v, np.ndarray)} for t in trials]
    static = [{k: v for k, v in t.inputs()[0].items() if not isinstance(v, np.ndarray)} for t in trials]

    @partial(jax.jit, compiler_options=compiler_options)
    def every(arrays: list[dict[str, Any]]) -> list[Any]:
        return [silu_mul_block_quant(**a, **s) for a, s in zip(arrays, static, strict=True)]

    found = {t.case.name: t.check(out, t.inputs()[1]) for t, out in zip(trials, every(arrays), strict=True)}
    return {name: problem for name, problem in found.items() if problem}


def random_x(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(3).standard_normal(shape), jnp.bfloat16)


def bits(results: Any) -> list[bytes]:
    return [np.asarray(result).tobytes() for result in results]


@pytest.mark.parametrize("family", FAMILIES)
def test_cases(family: str) -> None:
    assert problems([case for name, case in CASES.items() if re.split("[-_]", name)[0] == family], **FAST) == {}


def test_cases_with_all_optimisations() -> None:
    assert problems([case for name, case in CASES.items() if "materialize_True-limit_None" in name]) == {}


def test_public_function() -> None:
    trial = Trial(OP, CASES["experts-ue8m0_packed-col_major_tma"], seed=0)
    assert trial.on(registry().get("pallas")) == ("passed", "")


@pytest.mark.parametrize(
    ("shape", "group_size", "scale_format"),
    [((21,), 24, "ue8m0_packed"), ((3, 6), 128, "float32"), ((9,), 5, "float32"), ((2,), 1500, "ue8m0")],
)
def test_gpu_tiles(shape: tuple[int, ...], group_size: int, scale_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masked = len(shape) == 2
    case = Case(
        f"gpu_tiles_{group_size}",
        {"...": shape, "D": 5 * group_size} | ({"E": 3} if masked else {}),
        {"group_size": group_size, "scale_format": scale_format},
        {"x": "bfloat16"},
        present=("num_rows",) if masked else (),
        fill={"num_rows": "row_counts", "x": "nan_past_rows"} if masked else {"x": "nan_some"},
    )
    monkeypatch.setattr(module.lax, "platform_dependent", lambda *operands, cuda, **_: cuda(*operands, interpret=True))
    assert problems([case], **FAST) == {}


def test_parts_of_a_large_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, num_rows = random_x(2, 23, 2, 3, 32), jnp.array([20, 7], jnp.int32)
    attrs: dict[str, Any] = {"quant_dtype": "int8", "scale_format": "float32", "scale_ub": None, "scale_min": None}
    attrs |= {"limit": None, "materialize": False, "reciprocal": False}
    in_parts = partial(module._in_parts, tile=(4, 3, 32), interpret=True, **attrs)
    whole = jax.jit(in_parts)(x, num_rows)
    launched, launch = [], module._launch

    def recorded(*arrays: jax.Array, rows: slice, **attrs: Any) -> Any:
        launched.append((rows.start, rows.stop))
        return launch(*arrays, rows=rows, **attrs)

    monkeypatch.setattr(module, "_launch", recorded)
    monkeypatch.setattr(module, "_INT32_MAX", 2 * 96 * 9)  # both experts' next 9 rows, so 8
    parts = jax.jit(partial(in_parts))(x, num_rows)
    assert launched == [(0, 8), (8, 16), (16, 23)]
    assert bits(parts) == bits(whole)


def test_vmap() -> None:
    x = random_x(3, 3, 5, 256)
    num_rows = jnp.array([[2, 0, 5], [1, 1, 1], [9, -1, 3]], jnp.int32)
    op = jax.jit(lambda x, n: silu_mul_block_quant(x, num_rows=n, group_size=32, scale_format="ue8m0_packed"))
    each = [op(np.asarray(x)[i], np.asarray(num_rows)[i]) for i in range(3)]
    batched = jax.vmap(op)(x, num_rows)
    assert bits(batched) == bits(np.stack(results) for results in zip(*each, strict=True))


def test_under_shard_map() -> None:
    mesh, rows = Mesh(np.array(jax.devices("cpu")[:4]), ("rows",)), PartitionSpec("rows")
    x = np.asarray(random_x(8, 256))
    op = partial(silu_mul_block_quant, group_size=64)
    mapped = jax.shard_map(op, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    results = jax.jit(mapped)(jax.device_put(x, NamedSharding(mesh, rows)))
    assert all(result.sharding.is_equivalent_to(NamedSharding(mesh, rows), result.ndim) for result in results)
    assert bits(results) == bits(op(jax.device_put(x, jax.devices("cpu")[0])))


def test_rows_past_num_rows() -> None:
    x = random_x(3, 4, 64)
    q, scale = map(np.asarray, silu_mul_block_quant(x, num_rows=jnp.array([9, -1, 2], jnp.int32), group_size=32))
    all_q, all_scale = map(np.asarray, silu_mul_block_quant(x, group_size=32))
    for expert, count in enumerate((4, 0, 2)):
        assert q[expert, :count].tobytes() == all_q[expert, :count].tobytes()
        assert scale[expert, :count].tobytes() == all_scale[expert, :count].tobytes()
        assert not q[expert, count:].astype(np.float32).any()
        assert (scale[expert, count:] == np.float32(1 / (448 * 512))).all()


def test_fnuz_bytes() -> None:
    grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fnuz)
    values = grid.astype(np.float32)
    values = np.concatenate([values, values * 1.03, np.array([-0.0, 300, -np.inf], np.float32)])
    want = np.clip(values, -224, 224).astype(ml_dtypes.float8_e4m3fnuz)
    np.testing.assert_array_equal(jax.jit(module._fnuz_bytes)(values), want.view(np.uint8))


@pytest.mark.parametrize(
    ("quant_dtype", "scale_format"),
    [*((dtype, "float32") for dtype in QMAX), ("float8_e4m3fn", "ue8m0"), ("float8_e4m3fn", "ue8m0_packed")],
)
def test_lowers_to_one_kernel(quant_dtype: str, scale_format: str) -> None:
    op = partial(silu_mul_block_quant, quant_dtype=quant_dtype, scale_format=scale_format)
    assert triton_kernels(op, jax.ShapeDtypeStruct((4096, 4096), "bfloat16")) == 1


@pytest.mark.parametrize(
    ("group_size", "dtype"), [(1, "bfloat16"), (7, "bfloat16"), (48, "float16"), (1500, "float32")]
)
def test_lowers_with_any_group(group_size: int, dtype: str) -> None:
    op = partial(silu_mul_block_quant, group_size=group_size, materialize=True, limit=7.0, scale_ub=2.0)
    assert triton_kernels(op, jax.ShapeDtypeStruct((5, 6 * group_size), dtype)) == 1


def test_lowers_with_experts_and_vmap() -> None:
    x, num_rows = jax.ShapeDtypeStruct((8, 64, 4096), "bfloat16"), jax.ShapeDtypeStruct((8,), "int32")
    assert triton_kernels(lambda x, n: silu_mul_block_quant(x, num_rows=n), x, num_rows) == 1
    assert triton_kernels(jax.vmap(silu_mul_block_quant), x) == 1


def test_more_than_2_31_elements_take_two_kernels() -> None:
    q, scale = jax.eval_shape(silu_mul_block_quant, jax.ShapeDtypeStruct((211_200, 24_576), "bfloat16"))
    assert (q.shape, scale.shape) == ((211_200, 12_288), (211_200, 96))
    assert triton_kernels(silu_mul_block_quant, jax.ShapeDtypeStruct((211_200, 24_576), "bfloat16")) == 2


def triton_kernels(op: Any, *arguments: Any) -> int:
    """Triton kernels in the program for CUDA."""
    targets = ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")
    checks = [export.DisabledSafetyCheck.custom_call(target) for target in targets]
    program = export.export(jax.jit(op), platforms=["cuda"], disabled_checks=checks)(*arguments).mlir_module()
    return sum(program.count(f"@{target}") for target in targets)
