"""The oracle of `silu_mul_block_quant` with `reciprocal`, and the powers of two that its scales are rounded up to."""

from dataclasses import fields
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import polyfuse
from polyfuse.conformance.checks.values import compare
from polyfuse.reference import oracle
from polyfuse.reference._quantiser import (
    Interval,
    Quantiser,
    _scale_interval,
    bounded_scale,
    power_of_two_above,
    raw_scale,
)
from polyfuse.spec.block_quant import QMAX

silu_mul_block_quant = oracle("silu_mul_block_quant")
exact = silu_mul_block_quant.intervals


def quantiser(**options: Any) -> Quantiser:
    """Of groups of one, with a low floor."""
    none = dict.fromkeys(field.name for field in fields(Quantiser))
    return Quantiser(**none | {"group_size": 1, "scale_format": "float32", "scale_min": 1e-30} | options)


def scale_interval(amax: Any, **options: Any) -> Any:
    """The interval of the scale of groups of one, whose |y| is known to be these."""
    bound = silu_mul_block_quant.spec.bound("scale").error(options)
    return _scale_interval(Interval(*(amax[:, None],) * 3), quantiser(**options), *bound)


@pytest.mark.parametrize("quant_dtype", QMAX)
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_with_reciprocal_the_scale_of_an_amax_is_one_number(scale_format: str, quant_dtype: str) -> None:
    qmax = np.float32(QMAX[quant_dtype])
    amax = np.geomspace(1e-3, 1e30, 1000).astype(np.float32)
    edges = qmax * 2.0 ** np.arange(-9, 70, dtype=np.float32)
    sides = [np.nextafter(edges, np.float32(end), dtype=np.float32) for end in (0, np.inf)]
    amax = np.concatenate([amax, edges, *sides])
    product = amax * (np.float32(1) / qmax)
    power_of_two = scale_format == "ue8m0"
    want = np.exp2(np.ceil(np.log2(product.astype(np.float64)))) if power_of_two else product
    wide = amax.astype(np.float64)
    by = quantiser(quant_dtype=quant_dtype, scale_format=scale_format, reciprocal=True)
    np.testing.assert_array_equal(bounded_scale(raw_scale(wide, by), wide, by), want)
    for end in scale_interval(wide, quant_dtype=quant_dtype, scale_format=scale_format, reciprocal=True):
        np.testing.assert_array_equal(end[:, 0], want)


def test_with_reciprocal_a_product_that_rounds_to_a_power_of_two_stays_there() -> None:
    """The one mantissa whose quotient, 1 + 2**-24 of a power, is above it."""
    amax = np.nextafter(np.float32(127), np.float32(128)).astype(np.float64)[None]
    for reciprocal, want in ((False, 2.0), (True, 1.0)):
        assert power_of_two_above(raw_scale(amax, quantiser(quant_dtype="int8", reciprocal=reciprocal))) == want
        found = scale_interval(amax, quant_dtype="int8", scale_format="ue8m0", reciprocal=reciprocal)
        assert (found.value, found.high) == (want, want)


def test_powers_of_two() -> None:
    scale = np.array([2.0**-126, 1, np.nextafter(1, 2), 1.5, 2, np.inf, np.nan])
    np.testing.assert_array_equal(power_of_two_above(scale), [2.0**-126, 1, 2, 2, 2, np.inf, np.nan])


def test_the_last_bit_tells_a_reciprocal_from_a_quotient() -> None:
    x = np.random.default_rng(0).standard_normal((32, 256)).astype(ml_dtypes.bfloat16)
    options: Any = {"group_size": 32, "materialize": True}
    _, quotient = polyfuse.silu_mul_block_quant(x, **options)
    _, product = polyfuse.silu_mul_block_quant(x, reciprocal=True, **options)
    want = exact(x, reciprocal=True, **options)["scale"]
    assert compare("scale", product, want, "float32") is None
    assert compare("scale", quotient, want, "float32") is not None
