"""The arithmetic of `silu_mul_block_quant` that both JAX layers share."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from polyfuse.reference._jax.quantisation import block_scale, divisor, exponent_byte, quantised
from polyfuse.spec.block_quant import QMAX


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
        scale(y, power_of_two=True, scale_ub=0.3), np.array([2**-126, 2**-8, 0.5, np.inf, np.nan], np.float32)
    )
    np.testing.assert_array_equal(
        scale(y, power_of_two=True, scale_ub=0.25), np.array([2**-126, 2**-8, 0.25, np.inf, np.nan], np.float32)
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


@pytest.mark.parametrize("dtype", list(QMAX)[:4])
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


def test_exponent_bytes() -> None:
    scale = jnp.array([2.0**-126, 0.5, 1, 2, 2.0**127, np.inf, np.nan], jnp.float32)
    assert exponent_byte(scale).tolist() == [1, 126, 127, 128, 254, 255, 255]
