"""`silu_mul_block_quant` in jax.numpy, and the arithmetic that it shares with the Pallas kernel."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polyfuse.conformance import cases
from polyfuse.conformance.runner import Trial
from polyfuse.dispatch import registry
from polyfuse.reference._jax.quantisation import block_scale, divisor, quantised
from polyfuse.reference._jax.rounding import rint, round_to
from polyfuse.reference.jax.silu_mul_block_quant import silu_mul_block_quant
from polyfuse.spec.silu_mul_block_quant import QMAX, SCALE_LAYOUTS

OP = "silu_mul_block_quant"
CASES = {case.name: case for case in cases(OP) if case.repeat == 1}
FAMILIES = sorted({re.split("[-_]", name)[0] for name in CASES})

# Compiling is most of the time here.
FAST = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def problems(names: list[str], seed: int = 0, **compiler_options: Any) -> dict[str, str]:
    """What is wrong with each wrong case's result. All cases are one compiled function, which puts x together."""
    trials = [Trial(OP, CASES[name], seed) for name in names]
    arrays: list[dict[str, Any]] = []
    static: list[dict[str, Any]] = []
    for trial in trials:
        values = trial.inputs()[0]
        arrays.append({k: jnp.asarray(v) for k, v in values.items() if isinstance(v, np.ndarray)})
        static.append({k: v for k, v in values.items() if k not in arrays[-1]})
        arrays[-1]["x"] = jnp.split(arrays[-1]["x"], 2, axis=-1)

    @partial(jax.jit, compiler_options=compiler_options)
    def every(arrays: list[dict[str, Any]]) -> list[Any]:
        joined = [a | {"x": jnp.concatenate(a["x"], axis=-1)} for a in arrays]
        return [silu_mul_block_quant(**a, **s) for a, s in zip(joined, static, strict=True)]

    found = {t.case.name: t.check(out, t.inputs()[1]) for t, out in zip(trials, every(arrays), strict=True)}
    return {name: problem for name, problem in found.items() if problem}


def random_x(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(3).standard_normal(shape), jnp.bfloat16)


def bits(results: Any) -> list[bytes]:
    return [np.asarray(result).tobytes() for result in results]


@pytest.mark.parametrize("family", FAMILIES)
def test_cases(family: str) -> None:
    assert problems([name for name in CASES if re.split("[-_]", name)[0] == family], **FAST) == {}


def test_cases_with_all_optimisations() -> None:
    names = [name for name in CASES if "materialize_True" in name or name.startswith("experts-ue8m0_packed")]
    assert problems([*names, "fill_nan_some-int8-ue8m0"], seed=1) == {}


def test_public_function() -> None:
    trial = Trial(OP, CASES["experts-ue8m0_packed-col_major_tma"], seed=0)
    assert trial.on(registry().get("jax")) == ("passed", "")


def test_vmap() -> None:
    x = random_x(3, 3, 5, 256)
    num_rows = jnp.array([[2, 0, 5], [1, 1, 1], [9, -1, 3]], jnp.int32)
    op = jax.jit(lambda x, n: silu_mul_block_quant(x, num_rows=n, group_size=32, scale_format="ue8m0_packed"))
    each = [op(np.asarray(x)[i], np.asarray(num_rows)[i]) for i in range(3)]
    batched = jax.vmap(op)(x, num_rows)
    assert bits(batched) == bits(np.stack(results) for results in zip(*each, strict=True))


def test_sharded_rows_stay_where_they_are() -> None:
    rows = NamedSharding(Mesh(np.array(jax.devices("cpu")[:4]), ("rows",)), PartitionSpec("rows"))
    x = jax.device_put(random_x(8, 256), jax.devices("cpu")[0])
    results = silu_mul_block_quant(jax.device_put(x, rows), group_size=64)
    assert bits(results) == bits(silu_mul_block_quant(x, group_size=64))
    assert all(result.sharding.is_equivalent_to(rows, result.ndim) for result in results)


def test_rows_past_num_rows() -> None:
    x = random_x(3, 4, 64)
    q, scale = map(np.asarray, silu_mul_block_quant(x, num_rows=jnp.array([9, -1, 2], jnp.int32), group_size=32))
    all_q, all_scale = map(np.asarray, silu_mul_block_quant(x, group_size=32))
    for expert, count in enumerate((4, 0, 2)):
        assert q[expert, :count].tobytes() == all_q[expert, :count].tobytes()
        assert scale[expert, :count].tobytes() == all_scale[expert, :count].tobytes()
        assert not q[expert, count:].astype(np.float32).any()
        assert (scale[expert, count:] == np.float32(1 / (448 * 512))).all()


def test_layouts_are_one_logical_array() -> None:
    results = [bits(silu_mul_block_quant(random_x(5, 256), scale_layout=layout)) for layout in SCALE_LAYOUTS]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0_packed"])
def test_no_columns(scale_format: str) -> None:
    q, scale = silu_mul_block_quant(jnp.zeros((3, 0), jnp.bfloat16), scale_format=scale_format)
    assert (q.shape, q.dtype) == ((3, 0), jnp.float8_e4m3fn)
    assert (scale.shape, scale.dtype) == ((3, 0), "float32" if scale_format == "float32" else "int32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_round_to_is_the_cast(dtype: str) -> None:
    target = np.dtype(getattr(ml_dtypes, dtype, dtype))
    grid = np.arange(2**16, dtype=np.uint16).view(target).astype(np.float32)
    grid = np.sort(grid[np.isfinite(grid)])
    ties = grid[:-1] / 2 + grid[1:] / 2
    values = np.concatenate([grid, ties, np.nextafter(ties, np.float32(np.inf)), [np.inf, -np.inf, np.nan, 3e38]])
    values = values[~(np.abs(values) < 2.0**-110)].astype(np.float32)  # the scale floor is far above
    with np.errstate(over="ignore"):
        want = values.astype(target).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(partial(round_to, dtype=dtype))(values), want)


def test_rint() -> None:
    values = np.concatenate([np.arange(-130, 130, 0.25), [0.49999997, -0.49999997, np.inf, -np.inf, np.nan]])
    np.testing.assert_array_equal(jax.jit(rint)(values.astype(np.float32)), np.rint(values.astype(np.float32)))


@pytest.mark.parametrize("dtype", QMAX)
def test_power_of_two_scales_are_the_least(dtype: str) -> None:
    bounds: dict[str, Any] = {"scale_ub": None, "scale_min": None}
    scale_of = jax.jit(partial(block_scale, quant_dtype=dtype, power_of_two=True, reciprocal=False, **bounds))
    powers = np.float32(2.0) ** np.arange(-15, 110, dtype=np.float32)
    exact = np.float32(QMAX[dtype]) * powers
    np.testing.assert_array_equal(scale_of(exact[:, None]), powers)
    np.testing.assert_array_equal(scale_of(np.nextafter(exact, np.float32(0))[:, None]), powers)
    np.testing.assert_array_equal(scale_of(-np.nextafter(exact, np.float32(np.inf))[:, None]), 2 * powers)


@pytest.mark.parametrize("dtype", QMAX)
def test_scales_from_the_reciprocal_are_the_rounded_products(dtype: str) -> None:
    bounds: dict[str, Any] = {"scale_ub": None, "scale_min": 2.0**-126}
    qmax = np.float32(QMAX[dtype])
    edges = qmax * np.float32(2.0) ** np.arange(-110, 110, dtype=np.float32)
    sides = [np.nextafter(edges, np.float32(end)) for end in (0, np.inf)]
    amax = np.concatenate([np.geomspace(1e-30, 1e38, 1000, dtype=np.float32), edges, *sides])
    product = np.maximum(amax * (np.float32(1) / qmax), np.float32(2.0**-126))
    for power_of_two, want in ((False, product), (True, np.exp2(np.ceil(np.log2(product.astype(np.float64)))))):
        scale_of = jax.jit(
            partial(block_scale, quant_dtype=dtype, power_of_two=power_of_two, reciprocal=True, **bounds)
        )
        np.testing.assert_array_equal(scale_of(amax[:, None]), want)


def test_scale_bounds() -> None:
    y = np.array([[0.0], [1.0], [1e6], [np.inf], [np.nan]], np.float32)
    scale = partial(block_scale, quant_dtype="float8_e4m3fn", scale_min=None, reciprocal=False)
    np.testing.assert_array_equal(
        scale(y, power_of_two=True, scale_ub=0.3), np.array([2**-17, 2**-8, 0.5, np.inf, np.nan], np.float32)
    )
    np.testing.assert_array_equal(
        scale(y, power_of_two=True, scale_ub=0.25), np.array([2**-17, 2**-8, 0.25, np.inf, np.nan], np.float32)
    )
    np.testing.assert_array_equal(
        scale(y, power_of_two=False, scale_ub=1e-9)[:3], np.full(3, 1 / (448 * 512), np.float32)
    )
    np.testing.assert_array_equal(
        scale(y, power_of_two=True, scale_ub=1e300), scale(y, power_of_two=True, scale_ub=None)
    )
    for least, want in ((0.0, 0.0), (0.25, 0.25), (2.0**127, 2.0**127)):
        np.testing.assert_allclose(
            scale(y, power_of_two=False, scale_ub=None, scale_min=least),
            [want, max(want, 1 / 448), max(want, 1e6 / 448), np.inf, np.nan],
            rtol=2**-23,
        )


def test_a_scale_of_zero_is_no_divisor() -> None:
    scale = jnp.array([0, 1e-13, 1e-12, 0.5, np.inf, np.nan], jnp.float32)
    want = np.array([1e-12, 1e-12, 1e-12, 0.5, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(divisor(scale, 0.0), want)
    np.testing.assert_array_equal(divisor(scale[1:], 1e-20), scale[1:])


@pytest.mark.parametrize("dtype", QMAX)
def test_quantised_saturates_and_rounds_to_even(dtype: str) -> None:
    target = np.dtype(getattr(ml_dtypes, dtype, dtype))
    grid = np.unique(np.arange(256, dtype=np.uint8).view(target).astype(np.float32))
    grid = grid[np.abs(grid) <= QMAX[dtype]]
    ties = grid[:-1] / 2 + grid[1:] / 2
    cast = jax.jit(partial(quantised, dtype=dtype))
    up = cast(np.nextafter(ties, np.float32(np.inf))).astype(jnp.float32)
    down = cast(np.nextafter(ties, np.float32(-np.inf))).astype(jnp.float32)
    np.testing.assert_array_equal(up, grid[1:])
    np.testing.assert_array_equal(down, grid[:-1])
    even = np.abs(np.asarray(cast(ties)).view(np.int8).astype(np.int32)) % 2
    assert not even.any()
    past = np.asarray(cast(np.array([np.inf, -np.inf, 1e30, np.nan], np.float32))).astype(np.float32)
    np.testing.assert_array_equal(past, [QMAX[dtype], -QMAX[dtype], QMAX[dtype], 0 if dtype == "int8" else np.nan])
