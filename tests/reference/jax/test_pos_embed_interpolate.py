"""The jax.numpy implementation: right on every case, and under jit, vmap, grad and sharding."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polyfuse.conformance import Case, Trial, cases
from polyfuse.conformance.cases import all_cases
from polyfuse.reference import pos_embed_interpolate as oracle
from polyfuse.reference.jax.pos_embed_interpolate import _image_ends, pos_embed_interpolate
from polyfuse.spec import Unsupported

CASES = [case for case in cases("pos_embed_interpolate") if case.repeat == 1]
FAMILIES = sorted({case.name.replace("_", "-").split("-")[0] for case in CASES})
GRID = ((1, 8, 6), (2, 4, 4), (1, 2, 20))
ROWS = 120
INT32_MAX = 2**31 - 1

# Compiling is most of the time here.
FAST = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


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


def weights(grid: tuple[tuple[int, int, int], ...], side: int = 6, **attrs: Any) -> np.ndarray[Any, Any]:
    """The op's matrix [rows, side * side]: its result is weights @ table."""
    return oracle.pos_embed_interpolate.intervals(np.eye(side * side), grid, **attrs)["out"].value


@pytest.mark.parametrize("family", FAMILIES)
def test_cases(family: str) -> None:
    assert problems([case for case in CASES if case.name.replace("_", "-").split("-")[0] == family]) == {}


def test_real_shape() -> None:
    [case] = [case for case in all_cases("pos_embed_interpolate") if case.name.endswith("photo_512")]
    assert case.dims == {"N": 48, "D": 1152}
    assert problems([case]) == {}


def test_one_compilation_serves_all_grids_of_one_size() -> None:
    table, traces = normal(36, 8), 0

    @jax.jit
    def interpolate(grid: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return pos_embed_interpolate(table, grid, out_rows=ROWS)

    for grid in (GRID, ((1, 2, 2), (1, 4, 6), (0, 0, 0)), ((1, 2, 60), (0, 0, 0), (0, 0, 0))):
        static = pos_embed_interpolate(table, grid, out_rows=ROWS)
        np.testing.assert_allclose(interpolate(jnp.array(grid)), static, atol=1e-6)
        np.testing.assert_allclose(static[: len(weights(grid))], weights(grid) @ np.asarray(table), atol=1e-5)
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


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_gradients_are_the_transposed_weights(mode: str) -> None:
    table, base, seed = normal(36, 8), normal(150, 8, seed=1), normal(150, 8, seed=2)
    interpolate = partial(pos_embed_interpolate, mode=mode, out_rows=150)
    _, pull_back = jax.vjp(lambda table, base: interpolate(table, GRID, base=base), table, base)
    for_table, for_base = pull_back(seed)
    matrix = weights(GRID, mode=mode, out_rows=150)
    np.testing.assert_allclose(for_table, matrix.T @ np.asarray(seed), atol=2e-5)
    np.testing.assert_array_equal(for_base, seed.at[ROWS:].set(0))


def test_gradient_of_a_bfloat16_table_accumulates_in_float32() -> None:
    grid = ((1, 64, 64),)
    gradient = jax.grad(lambda table: pos_embed_interpolate(table, grid, out_dtype="float32").sum())
    sums = np.broadcast_to(weights(grid).sum(0)[:, None], (36, 2))
    # A bfloat16 sum stops growing at 128 if what is added is below 0.5.
    assert sums.max() > 150
    np.testing.assert_allclose(gradient(jnp.ones((36, 2), "bfloat16")).astype("float32"), sums, rtol=2**-8)


def test_gradient_is_finite_where_unread_values_are_not() -> None:
    grid, base = ((1, 2, 2),), jnp.full((6, 3), jnp.nan).at[:4].set(1)
    corners = [0, 5, 30, 35]
    table = jnp.full((36, 3), jnp.nan).at[jnp.array(corners)].set(2)
    loss = jax.value_and_grad(
        lambda table, base: pos_embed_interpolate(table, grid, base=base, out_rows=6).sum(), argnums=(0, 1)
    )
    value, (for_table, for_base) = loss(table, base)
    assert value == 4 * 3 * 3
    np.testing.assert_array_equal(for_table, jnp.zeros((36, 3)).at[jnp.array(corners)].set(1))
    np.testing.assert_array_equal(for_base, jnp.zeros((6, 3)).at[:4].set(1))


@pytest.mark.parametrize(
    ("table_axes", "base_axes"), [((None, "d"), (None, "d")), ((None, None), ("d", None))], ids=["columns", "rows"]
)
def test_sharded(table_axes: tuple[str | None, ...], base_axes: tuple[str | None, ...]) -> None:
    devices = jax.devices("cpu")
    assert len(devices) >= 4
    mesh = Mesh(np.array(devices[:4]), ("d",))
    shardings = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in (table_axes, base_axes)]
    table, base = np.asarray(normal(36, 8)), np.asarray(normal(ROWS, 8, seed=1))
    sharded = jax.jit(
        lambda table, base: pos_embed_interpolate(table, GRID, base=base),
        in_shardings=shardings,
        out_shardings=shardings[1],
    )
    compiled = sharded.lower(table, base).compile()
    program = compiled.as_text() or ""
    assert "ENTRY" in program
    assert not any(name in program for name in ("all-gather", "all-reduce", "all-to-all"))
    result = compiled(*(jax.device_put(x, s) for x, s in zip((table, base), shardings, strict=True)))
    assert {shard.data.size for shard in result.addressable_shards} == {ROWS * 8 // 4}
    np.testing.assert_allclose(result, weights(GRID) @ table + base, atol=1e-5)


def test_under_shard_map() -> None:
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("d",))
    columns = PartitionSpec(None, "d")
    mapped = jax.shard_map(
        lambda table: pos_embed_interpolate(table, GRID), mesh=mesh, in_specs=columns, out_specs=columns
    )
    table = jax.device_put(np.asarray(normal(36, 8)), NamedSharding(mesh, columns))
    np.testing.assert_allclose(jax.jit(mapped)(table), weights(GRID) @ np.asarray(table), atol=1e-5)


def test_taps_are_not_held_together() -> None:
    grid, width = ((1, 32, 32),), 256
    compiled = jax.jit(lambda table: pos_embed_interpolate(table, grid, mode="bicubic")).lower(normal(36, width))
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
def test_row_counts_do_not_wrap(grid: list[tuple[int, int, int]], valid: bool) -> None:
    ends, accepted = _image_ends(jnp.array(grid, "int32"), merge_size=2, side=6, rows=INT32_MAX)
    assert accepted == valid
    if valid:
        assert ends[-1] == sum(t * h * w for t, h, w in grid)


def test_64_bit_grid() -> None:
    with jax.enable_x64(True):
        table = normal(36, 8)
        right = pos_embed_interpolate(table, jnp.array(GRID, "int64"), out_rows=ROWS)
        wrong = pos_embed_interpolate(table, jnp.array([(2**32 + 1, 2, 2)], "int64"), out_rows=ROWS)
    assert right.dtype == "float32"
    np.testing.assert_allclose(right, weights(GRID) @ np.asarray(table), atol=1e-5)
    assert np.isnan(wrong).all()


def test_more_rows_than_int32_counts_are_declined() -> None:
    with pytest.raises(Unsupported, match="rows=2147483648: row numbers are int32"):
        pos_embed_interpolate(normal(36, 8), ((2**29, 2, 2),))


@pytest.mark.parametrize(("width", "grid", "rows"), [(0, GRID, 150), (8, [(0, 0, 0)], 0), (8, [], 5)])
def test_nothing_to_compute(width: int, grid: Any, rows: int) -> None:
    grid = jnp.array(grid, "int32").reshape(-1, 3)
    result = pos_embed_interpolate(normal(36, width), grid, out_dtype="float16", out_rows=rows)
    np.testing.assert_array_equal(result, np.zeros((rows, width), "float16"), strict=True)
