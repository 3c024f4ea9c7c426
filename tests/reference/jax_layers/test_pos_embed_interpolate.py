"""`pos_embed_interpolate` in both JAX layers: right on every case, under jit, vmap, grad and sharding, and lowered."""

from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from polyfuse.conformance import cases, compare
from polyfuse.conformance.cases import model_cases
from polyfuse.reference import oracle
from polyfuse.spec import Unsupported

OP = "pos_embed_interpolate"
CASES = [case for case in cases(OP) if case.repeat == 1]
GRID = ((1, 8, 6), (2, 4, 4), (1, 2, 20))
ROWS = 120
INT32_MAX = 2**31 - 1
GPU = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def problem(result: jax.Array, table: Any, grid: Any, **options: Any) -> str | None:
    """What is wrong with a result of these arguments, or None."""
    exact = oracle(OP).intervals(np.asarray(table), grid, **options)["out"]
    return compare("out", np.asarray(result), exact, "float32")


def weights(grid: tuple[tuple[int, int, int], ...], side: int = 6, **attrs: Any) -> np.ndarray[Any, Any]:
    """The op's matrix [rows, side * side]: its result is weights @ table."""
    return oracle(OP).intervals(np.eye(side * side, dtype=np.float32), grid, **attrs)["out"].value


def test_cases(layer: Any, part: Any, cpu_tiles: None) -> None:
    assert layer.problems(part(CASES)) == {}


def test_public_function(layer: Any) -> None:
    [case] = [case for case in CASES if case.name == "padded-bilinear-grid_tensor-base"]
    assert layer.public(case) == ("passed", "")


def test_real_shape(layer: Any) -> None:
    [case] = [case for case in model_cases(OP) if case.name.endswith("photo_512")]
    assert case.dims == {"N": 48, "D": 1152}
    assert layer.problems([case]) == {}


def test_one_compilation_serves_all_grids_of_one_size(layer: Any) -> None:
    table, traces = normal(36, 8), 0

    @jax.jit
    def interpolate(grid: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return layer.function(table, grid, out_rows=ROWS)

    for grid in (GRID, ((1, 2, 2), (1, 4, 6), (0, 0, 0)), ((1, 2, 60), (0, 0, 0), (0, 0, 0))):
        traced, static = interpolate(jnp.array(grid)), layer.function(table, grid, out_rows=ROWS)
        np.testing.assert_allclose(traced, static, atol=1e-6)
        assert problem(traced, table, grid, out_rows=ROWS) is None
        assert problem(static, table, grid, out_rows=ROWS) is None
    assert traces == 1


def test_vmap_over_table_and_base(layer: Any) -> None:
    tables, bases = normal(3, 36, 8), normal(3, ROWS, 8, seed=1)
    mapped = jax.vmap(lambda table, base: layer.function(table, GRID, base=base))(tables, bases)
    for table, base, result in zip(tables, bases, mapped, strict=True):
        np.testing.assert_allclose(result, layer.function(table, GRID, base=base), atol=1e-6)


def test_vmap_over_grids(layer: Any) -> None:
    table = normal(36, 8)
    grids = jnp.array([[(1, 4, 4), (0, 0, 0)], [(1, 2, 2), (1, 2, 4)], [(1, 4, 4), (1, 3, 2)]])
    mapped = jax.vmap(lambda grid: layer.function(table, grid, out_rows=20))(grids)
    for grid, result in zip(grids, mapped, strict=True):
        np.testing.assert_allclose(result, layer.function(table, grid, out_rows=20), atol=1e-6)
    np.testing.assert_array_equal(np.isnan(mapped).all((1, 2)), [False, False, True])


@pytest.mark.parametrize(
    "grid",
    [[(2**10, 2**11, 2**11)], [(1, 2**16, 2**16)], [(INT32_MAX, 2, 2)], [(1, 2, 2**28)], [(1, 2, 2), (-1, 2, 2)]],
    ids=["product_2_32", "frame_2_32", "frames", "coordinates", "negative"],
)
def test_unusable_grids_poison_the_result(layer: Any, grid: list[tuple[int, int, int]]) -> None:
    result = layer.function(normal(36, 8), jnp.array(grid, "int32"), out_rows=40)
    assert np.isnan(result).all()


def test_64_bit_grid(layer: Any) -> None:
    with jax.enable_x64(True):
        table = normal(36, 8)
        right = layer.function(table, jnp.array(GRID, "int64"), out_rows=ROWS)
        wrong = layer.function(table, jnp.array([(2**32 + 1, 2, 2)], "int64"), out_rows=ROWS)
    assert problem(right, table, GRID) is None
    assert np.isnan(wrong).all()


def test_more_rows_than_int32_counts_are_declined(layer: Any) -> None:
    with pytest.raises(Unsupported, match="rows=2147483648: row numbers are int32"):
        layer.function(normal(36, 8), ((2**29, 2, 2),))


@pytest.mark.parametrize(("width", "grid", "rows"), [(0, GRID, 150), (8, [(0, 0, 0)], 0), (8, [], 5)])
def test_nothing_to_compute(layer: Any, width: int, grid: Any, rows: int) -> None:
    grid = jnp.array(grid, "int32").reshape(-1, 3)
    result = layer.function(normal(36, width), grid, out_dtype="float16", out_rows=rows)
    np.testing.assert_array_equal(result, np.zeros((rows, width), "float16"), strict=True)


@pytest.mark.parametrize("table_height", [None, 4])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_gradients_are_the_transposed_weights(jax_layer: Any, mode: str, table_height: int | None) -> None:
    table, base, seed = normal(36, 8), normal(150, 8, seed=1), normal(150, 8, seed=2)
    interpolate = partial(jax_layer.function, mode=mode, out_rows=150, table_height=table_height)
    _, pull_back = jax.vjp(lambda table, base: interpolate(table, GRID, base=base), table, base)
    for_table, for_base = pull_back(seed)
    matrix = weights(GRID, mode=mode, out_rows=150, table_height=table_height)
    np.testing.assert_allclose(for_table, matrix.T @ np.asarray(seed), atol=2e-5)
    np.testing.assert_array_equal(for_base, seed.at[ROWS:].set(0))


def test_gradient_of_a_bfloat16_table_accumulates_in_float32(jax_layer: Any) -> None:
    grid = ((1, 64, 64),)
    gradient = jax.grad(lambda table: jax_layer.function(table, grid, out_dtype="float32").sum())
    sums = np.broadcast_to(weights(grid).sum(0)[:, None], (36, 2))
    # A bfloat16 sum stops growing at 128 if what is added is below 0.5.
    assert sums.max() > 150
    np.testing.assert_allclose(gradient(jnp.ones((36, 2), "bfloat16")).astype("float32"), sums, rtol=2**-8)


def test_gradient_is_finite_where_unread_values_are_not(jax_layer: Any) -> None:
    grid, base = ((1, 2, 2),), jnp.full((6, 3), jnp.nan).at[:4].set(1)
    corners = [0, 5, 30, 35]
    table = jnp.full((36, 3), jnp.nan).at[jnp.array(corners)].set(2)
    loss = jax.value_and_grad(
        lambda table, base: jax_layer.function(table, grid, base=base, out_rows=6).sum(), argnums=(0, 1)
    )
    value, (for_table, for_base) = loss(table, base)
    assert value == 4 * 3 * 3
    np.testing.assert_array_equal(for_table, jnp.zeros((36, 3)).at[jnp.array(corners)].set(1))
    np.testing.assert_array_equal(for_base, jnp.zeros((6, 3)).at[:4].set(1))


@pytest.mark.parametrize(
    ("table_axes", "base_axes"), [((None, "d"), (None, "d")), ((None, None), ("d", None))], ids=["columns", "rows"]
)
def test_sharded(
    jax_layer: Any, mesh: Mesh, table_axes: tuple[str | None, ...], base_axes: tuple[str | None, ...]
) -> None:
    shardings = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in (table_axes, base_axes)]
    table, base = np.asarray(normal(36, 8)), np.asarray(normal(ROWS, 8, seed=1))
    sharded = jax.jit(
        lambda table, base: jax_layer.function(table, GRID, base=base),
        in_shardings=shardings,
        out_shardings=shardings[1],
    )
    compiled = sharded.lower(table, base).compile()
    program = compiled.as_text() or ""
    assert "ENTRY" in program
    assert not any(name in program for name in ("all-gather", "all-reduce", "all-to-all"))
    result = compiled(*(jax.device_put(x, s) for x, s in zip((table, base), shardings, strict=True)))
    assert {shard.data.size for shard in result.addressable_shards} == {ROWS * 8 // 4}
    assert problem(result, table, GRID, base=base) is None


def test_columns_under_shard_map(layer: Any, mesh: Mesh) -> None:
    columns = PartitionSpec(None, "d")
    table, base = np.asarray(normal(36, 8)), np.asarray(normal(ROWS, 8, seed=1))
    mapped = jax.shard_map(
        lambda table, base: layer.function(table, GRID, base=base),
        mesh=mesh,
        in_specs=columns,
        out_specs=columns,
        check_vma=layer.name == "jax",  # a kernel does not say how its results vary over the mesh
    )
    result = jax.jit(mapped)(*(jax.device_put(x, NamedSharding(mesh, columns)) for x in (table, base)))
    assert {shard.data.shape for shard in result.addressable_shards} == {(ROWS, 2)}
    assert problem(result, table, GRID, base=base) is None


def test_taps_are_not_held_together(jax_layer: Any, optimised: None) -> None:
    grid, width = ((1, 32, 32),), 256
    compiled = jax.jit(lambda table: jax_layer.function(table, grid, mode="bicubic")).lower(normal(36, width))
    memory = compiled.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * (1024 * width * 4)


@pytest.mark.parametrize(
    ("grid", "valid"),
    [
        ([(1, 2**15, 2**15), (1, 2**15, 2**15 - 2)], True),
        ([(1, 2**15, 2**15), (1, 2**15, 2**15)], False),
        ([(1, 2**15, 2**15)] * 4 + [(1, 2, 2)], False),
        ([(2**10, 2**11, 2**11)], False),
        ([(1, 2**16, 2**16)], False),
        ([(INT32_MAX, 2, 2)], False),
        ([(1, 2, 2**28)], False),
    ],
    ids=["below_2_31", "sum_2_31", "sum_2_32", "product_2_32", "frame_2_32", "frames", "coordinates"],
)
def test_row_counts_do_not_wrap(jax_layer: Any, grid: list[tuple[int, int, int]], valid: bool) -> None:
    image_ends = jax_layer.module._image_ends
    ends, accepted = image_ends(jnp.array(grid, "int32"), merge_size=2, side=6, rows=INT32_MAX)
    assert accepted == valid
    if valid:
        assert ends[-1] == sum(t * h * w for t, h, w in grid)


@pytest.mark.parametrize(
    ("mode", "align_corners", "dtype", "rows"),
    [("bilinear", True, "bfloat16", 150), ("bicubic", False, "float32", ROWS)],
)
def test_gpu_tiles(pallas_layer: Any, mode: str, align_corners: bool, dtype: str, rows: int) -> None:
    """Tiles as on a GPU, ragged in rows and columns, in the interpreter, which pads them with NaN."""
    width, tile = 131, pallas_layer.module._GPU_TILE
    attrs: dict[str, Any] = {"merge_size": 2, "mode": mode, "align_corners": align_corners, "table_height": 4}
    table, base = normal(36, width, dtype=dtype), normal(rows, width, dtype=dtype, seed=1)
    grid = jnp.array([*GRID, (0, 0, 0)]).T
    launch = partial(pallas_layer.module._launch, tile=tile, dtype=dtype, rows=rows, interpret=True, **attrs)
    result = jax.jit(launch)(grid, table, base)
    exact = oracle(OP).intervals(np.asarray(table), GRID, base=np.asarray(base), out_rows=rows, **attrs)["out"]
    assert rows % tile[0]
    assert width % tile[1]
    assert compare("out", np.asarray(result), exact, dtype) is None


def program(layer: Any, lowered: Any, platform: str, dtype: str, mode: str) -> str:
    """What the op is lowered to, with a base and a traced grid."""
    table, base = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((48 * 48, 1152), (2000, 1152)))
    grid = jax.ShapeDtypeStruct((5, 3), "int32")

    def function(table: jax.Array, grid: jax.Array, base: jax.Array) -> jax.Array:
        return layer.function(table, grid, mode=mode, base=base, out_rows=2000)

    with use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=GPU)):
        return lowered(function, table, grid, base, platform=platform)


@pytest.mark.parametrize(
    ("platform", "dtype", "mode"),
    [*product(["cuda"], ["float32", "bfloat16"], ["bilinear", "bicubic"]), ("rocm", "bfloat16", "bilinear")],
)
def test_lowered_to_one_native_kernel(pallas_layer: Any, lowered: Any, platform: str, dtype: str, mode: str) -> None:
    assert platform in pallas_layer.module.CAPABILITY.devices
    module = program(pallas_layer, lowered, platform, dtype, mode)
    assert module.count("custom_call @__gpu$xla.gpu.triton") == 1
    assert "stablehlo.while" not in module


def test_interpreted_on_cpu(pallas_layer: Any, lowered: Any) -> None:
    module = program(pallas_layer, lowered, "cpu", "bfloat16", "bilinear")
    assert "stablehlo.while" in module
    assert "custom_call" not in module


def test_tpu_is_not_claimed(pallas_layer: Any, lowered: Any) -> None:
    assert "tpu" not in pallas_layer.module.CAPABILITY.devices
    with pytest.raises(NotImplementedError, match="tpu"):
        program(pallas_layer, lowered, "tpu", "bfloat16", "bilinear")
