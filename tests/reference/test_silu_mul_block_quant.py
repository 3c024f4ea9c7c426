"""Where the oracle leaves a backend a choice, and where it does not."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import polyfuse
from polyfuse.conformance.checks.values import compare
from polyfuse.dispatch import from_numpy, registry, to_numpy
from polyfuse.reference import oracle
from polyfuse.reference.silu_mul_block_quant import _scales
from polyfuse.spec.silu_mul_block_quant import QMAX

exact = oracle("silu_mul_block_quant").intervals

# The interpreter computes with NumPy, which reports what overflows or is invalid.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def underflowing(dtype: Any) -> Any:
    """Rows of one group of 4: an infinite up beside a gate whose sigmoid is small, normal, or whose silu is small."""
    gate = np.array([[-89.0, 1, 1, 1], [-2000.0, 1, 1, 1], [-86.0, 1, 1, 1], [1e-39, 1, 1, 1], [0, 1, 1, 1]])
    up = np.tile([np.inf, 1, -2, 3], (len(gate), 1))
    return np.concatenate([gate, up], -1).astype(dtype)


@pytest.mark.parametrize("quant_dtype", ["float8_e4m3fn", "int8"])
def test_an_infinite_up_where_sigmoid_or_silu_may_count_as_zero(quant_dtype: str) -> None:
    found = exact(underflowing(np.float32), group_size=4, quant_dtype=quant_dtype)
    nan = 0.0 if quant_dtype == "int8" else np.nan

    def allowed(q: float, scale: float) -> list[bool]:
        """Per row, whether these are right for the finite elements and the scale."""
        qs = np.full((5, 4), q)
        qs[:, 0] = nan
        scales = np.full((5, 1), scale, np.float32)
        right = []
        for i in range(5):
            rows = {name: type(e)(e.value[i], e.low[i], e.high[i]) for name, e in found.items()}
            target = np.dtype(getattr(ml_dtypes, quant_dtype, quant_dtype))
            problems = (
                compare("q", qs[i].astype(target), rows["q"], quant_dtype),
                compare("scale", scales[i], rows["scale"], "float32"),
            )
            right.append(problems == (None, None))
        return right

    assert allowed(0.0, np.inf) == [True, True, True, True, False]
    assert allowed(nan, np.nan) == [True, True, False, True, True]
    assert allowed(0.0, 1.0) == [False] * 5


@pytest.mark.parametrize("name", ["numpy", "jax", "pallas", "torch", "triton"])
@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0_packed"])
def test_every_backend_takes_one_of_the_two(name: str, materialize: bool, scale_format: str) -> None:
    x = underflowing(ml_dtypes.bfloat16)
    options: Any = {"group_size": 4, "materialize": materialize, "scale_format": scale_format}
    backend = registry().get(name)
    with np.errstate(all="ignore"):
        got = polyfuse.silu_mul_block_quant(from_numpy(x, backend.family, "cpu"), backend=name, **options)
    dtypes = ("float8_e4m3fn", "float32" if scale_format == "float32" else "int32")
    for result, (output, want), dtype in zip(got, exact(x, **options).items(), dtypes, strict=True):
        assert compare(output, to_numpy(result), want, dtype) is None


@pytest.mark.parametrize("quant_dtype", QMAX)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_with_reciprocal_the_scale_of_an_amax_is_one_number(power_of_two: bool, quant_dtype: str) -> None:
    qmax = np.float32(QMAX[quant_dtype])
    amax = np.geomspace(1e-3, 1e30, 1000).astype(np.float32)
    edges = qmax * 2.0 ** np.arange(-9, 70, dtype=np.float32)
    sides = [np.nextafter(edges, np.float32(end), dtype=np.float32) for end in (0, np.inf)]
    amax = np.concatenate([amax, edges, *sides])
    product = amax * (np.float32(1) / qmax)
    want = np.exp2(np.ceil(np.log2(product.astype(np.float64)))) if power_of_two else product
    y = (amax[:, None].astype(np.float64),) * 3
    for scale in _scales(y, 1, float(qmax), 1e-30, None, power_of_two, True):
        np.testing.assert_array_equal(scale[:, 0], want)


def test_with_reciprocal_a_product_that_rounds_to_a_power_of_two_stays_there() -> None:
    """The one mantissa whose quotient, 1 + 2**-24 of a power, is above it."""
    amax = np.nextafter(np.float32(127), np.float32(128)).astype(np.float64)
    y = (np.full((1, 1), amax),) * 3
    for reciprocal, want in ((False, 2.0), (True, 1.0)):
        value, _, high = _scales(y, 1, 127.0, 1e-30, None, True, reciprocal)
        assert (value, high) == (want, want)


def test_the_last_bit_tells_a_reciprocal_from_a_quotient() -> None:
    x = np.random.default_rng(0).standard_normal((32, 256)).astype(ml_dtypes.bfloat16)
    options: Any = {"group_size": 32, "materialize": True}
    _, quotient = polyfuse.silu_mul_block_quant(x, **options)
    _, product = polyfuse.silu_mul_block_quant(x, reciprocal=True, **options)
    want = exact(x, reciprocal=True, **options)["scale"]
    assert compare("scale", product, want, "float32") is None
    assert compare("scale", quotient, want, "float32") is not None
