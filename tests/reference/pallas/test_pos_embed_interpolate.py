"""The Pallas kernel: right on every case when interpreted, lowered natively for the GPUs it claims."""

from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from polyfuse.conformance import Case, Trial, cases
from polyfuse.conformance.cases import all_cases
from polyfuse.conformance.checks.values import compare
from polyfuse.reference import oracle
from polyfuse.reference.pallas.pos_embed_interpolate import _GPU_TILE, CAPABILITY, _launch, pos_embed_interpolate
from polyfuse.spec import Unsupported

intervals = oracle("pos_embed_interpolate").intervals

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

CASES = [case for case in cases("pos_embed_interpolate") if case.repeat == 1]
FAMILIES = sorted({case.name.replace("_", "-").split("-")[0] for case in CASES})
GRID = ((1, 8, 6), (2, 4, 4), (1, 2, 20))
ROWS = 120

# Compiling is most of the time here.
FAST = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}

GPU = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
TRITON_CALL = "__gpu$xla.gpu.triton"


def problems(cases: list[Case]) -> dict[str, str]:
    """What is wrong with each wrong case's result; all cases are one compiled function."""
    trials = [Trial("pos_embed_interpolate", case, seed=0) for case in cases]
    static: list[dict[str, Any]] = []
    arrays: list[dict[str, Any]] = []
    for trial in trials:
        values, call = trial.inputs()
        arguments = {**values, **call.host, **call.attrs}
        arrays.append({k: jnp.asarray(v) for k, v in arguments.items() if isinstance(v, np.ndarray)})
        static.append({k: v for k, v in arguments.items() if k not in arrays[-1]})

    @partial(jax.jit, compiler_options=FAST)
    def every(arrays: list[dict[str, Any]]) -> list[jax.Array]:
        return [pos_embed_interpolate(**a, **s) for a, s in zip(arrays, static, strict=True)]

    found = {t.case.name: t.check(out, t.inputs()[1]) for t, out in zip(trials, every(arrays), strict=True)}
    return {name: problem for name, problem in found.items() if problem}


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def export(platform: str, dtype: str, mode: str) -> str:
    """The module that the op is lowered to, with a base and a traced grid."""
    table, base = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((48 * 48, 1152), (2000, 1152)))
    grid = jax.ShapeDtypeStruct((5, 3), "int32")
    function = jax.jit(
        lambda table, grid, base: pos_embed_interpolate(table, grid, mode=mode, base=base, out_rows=2000)
    )
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(TRITON_CALL)]
    with use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=GPU)):
        exported = jax.export.export(function, platforms=[platform], disabled_checks=unchecked)(table, grid, base)
    return str(exported.mlir_module())


@pytest.mark.parametrize("family", FAMILIES)
def test_cases(family: str) -> None:
    assert problems([case for case in CASES if case.name.replace("_", "-").split("-")[0] == family]) == {}


def test_real_shape() -> None:
    [case] = [case for case in all_cases("pos_embed_interpolate") if case.name.endswith("photo_512")]
    assert case.dims == {"N": 48, "D": 1152}
    assert problems([case]) == {}


@pytest.mark.parametrize(
    ("mode", "align_corners", "dtype", "rows"),
    [("bilinear", True, "bfloat16", 150), ("bicubic", False, "float32", ROWS)],
)
def test_gpu_tiles_interpreted(mode: str, align_corners: bool, dtype: str, rows: int) -> None:
    """Tiles as on a GPU, ragged in rows and columns, in the interpreter, which pads them with NaN."""
    width = 131
    attrs: dict[str, Any] = {"merge_size": 2, "mode": mode, "align_corners": align_corners}
    table, base = normal(36, width, dtype=dtype), normal(rows, width, dtype=dtype, seed=1)
    grid = jnp.array([*GRID, (0, 0, 0)]).T
    launch = partial(_launch, tile=_GPU_TILE, dtype=dtype, rows=rows, interpret=True, **attrs)
    result = jax.jit(launch, compiler_options=FAST)(grid, table, base)
    exact = intervals(np.asarray(table), GRID, base=np.asarray(base), out_rows=rows, **attrs)["out"]
    assert rows % _GPU_TILE[0]
    assert width % _GPU_TILE[1]
    assert compare("out", np.asarray(result), exact, dtype) is None


def test_one_compilation_serves_all_grids_of_one_size() -> None:
    table, traces = normal(36, 8), 0

    @jax.jit
    def interpolate(grid: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return pos_embed_interpolate(table, grid, out_rows=ROWS)

    for grid in (GRID, ((1, 2, 2), (1, 4, 6), (0, 0, 0)), ((1, 2, 60), (0, 0, 0), (0, 0, 0))):
        exact = intervals(np.asarray(table), grid, out_rows=ROWS)["out"]
        assert compare("out", np.asarray(interpolate(jnp.array(grid))), exact, "float32") is None
    assert traces == 1


def test_vmap_over_table_and_base() -> None:
    tables, bases = normal(3, 36, 8), normal(3, ROWS, 8, seed=1)
    mapped = jax.vmap(lambda table, base: pos_embed_interpolate(table, GRID, base=base))(tables, bases)
    for table, base, result in zip(tables, bases, mapped, strict=True):
        np.testing.assert_allclose(result, pos_embed_interpolate(table, GRID, base=base), atol=1e-6)


def test_vmap_over_grids() -> None:
    table = normal(36, 8)
    grids = jnp.array([[(1, 4, 4), (0, 0, 0)], [(1, 2, 2), (1, 2, 4)], [(1, 4, 4), (1, 3, 2)]])
    mapped = jax.vmap(lambda grid: pos_embed_interpolate(table, grid, out_rows=20))(grids)
    for grid, result in zip(grids, mapped, strict=True):
        np.testing.assert_allclose(result, pos_embed_interpolate(table, grid, out_rows=20), atol=1e-6)
    np.testing.assert_array_equal(np.isnan(mapped).all((1, 2)), [False, False, True])


def test_columns_sharded_over_devices() -> None:
    devices = jax.devices("cpu")
    assert len(devices) >= 4
    mesh, columns = Mesh(np.array(devices[:4]), ("d",)), PartitionSpec(None, "d")
    table, base = np.asarray(normal(36, 8)), np.asarray(normal(ROWS, 8, seed=1))
    mapped = jax.shard_map(
        lambda table, base: pos_embed_interpolate(table, GRID, base=base),
        mesh=mesh,
        in_specs=columns,
        out_specs=columns,
        check_vma=False,
    )
    result = jax.jit(mapped)(*(jax.device_put(x, NamedSharding(mesh, columns)) for x in (table, base)))
    assert {shard.data.shape for shard in result.addressable_shards} == {(ROWS, 2)}
    assert compare("out", np.asarray(result), intervals(table, GRID, base=base)["out"], "float32") is None


@pytest.mark.parametrize(
    ("platform", "dtype", "mode"),
    [*product(["cuda"], ["float32", "bfloat16"], ["bilinear", "bicubic"]), ("rocm", "bfloat16", "bilinear")],
)
def test_lowered_to_one_native_kernel(platform: str, dtype: str, mode: str) -> None:
    assert platform in CAPABILITY.devices
    module = export(platform, dtype, mode)
    assert module.count(f"custom_call @{TRITON_CALL}") == 1
    assert "stablehlo.while" not in module


def test_interpreted_on_cpu() -> None:
    module = export("cpu", "bfloat16", "bilinear")
    assert "stablehlo.while" in module
    assert "custom_call" not in module


def test_tpu_is_not_claimed() -> None:
    assert "tpu" not in CAPABILITY.devices
    with pytest.raises(NotImplementedError, match="tpu"):
        export("tpu", "bfloat16", "bilinear")


@pytest.mark.parametrize(
    "grid",
    [[(2**10, 2**11, 2**11)], [(1, 2**16, 2**16)], [(2**31 - 1, 2, 2)], [(1, 2, 2**28)], [(1, 2, 2), (-1, 2, 2)]],
    ids=["product_2_32", "frame_2_32", "frames", "coordinates", "negative"],
)
def test_unusable_grids_poison_the_result(grid: list[tuple[int, int, int]]) -> None:
    result = pos_embed_interpolate(normal(36, 8), jnp.array(grid, "int32"), out_rows=40)
    assert np.isnan(result).all()


def test_64_bit_grid() -> None:
    with jax.enable_x64(True):
        table = normal(36, 8)
        right = pos_embed_interpolate(table, jnp.array(GRID, "int64"), out_rows=ROWS)
        wrong = pos_embed_interpolate(table, jnp.array([(2**32 + 1, 2, 2)], "int64"), out_rows=ROWS)
    assert compare("out", np.asarray(right), intervals(np.asarray(table), GRID)["out"], "float32") is None
    assert np.isnan(wrong).all()


def test_more_rows_than_int32_counts_are_declined() -> None:
    with pytest.raises(Unsupported, match="rows=2147483648: row numbers are int32"):
        pos_embed_interpolate(normal(36, 8), ((2**29, 2, 2),))


@pytest.mark.parametrize(("width", "grid", "rows"), [(0, GRID, 150), (8, [(0, 0, 0)], 0), (8, [], 5)])
def test_nothing_to_compute(width: int, grid: Any, rows: int) -> None:
    grid = jnp.array(grid, "int32").reshape(-1, 3)
    result = pos_embed_interpolate(normal(36, width), grid, out_dtype="float16", out_rows=rows)
    np.testing.assert_array_equal(result, np.zeros((rows, width), "float16"), strict=True)
