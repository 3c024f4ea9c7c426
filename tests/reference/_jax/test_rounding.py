"""The rounding that both JAX layers write their formulas with."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from polyfuse.reference._jax.rounding import bits_of, clamp, from_exponent, rint, round_to


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


def test_round_to_float8_is_the_cast() -> None:
    grid = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = grid[:-1] / 2 + grid[1:] / 2
    values = np.concatenate([grid, ties, np.nextafter(ties, np.float32(np.inf)), -ties, [np.nan]])
    want = values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(partial(round_to, dtype="float8_e4m3fn"))(values), want)
    assert round_to(jnp.float32(465), "float8_e4m3fn") == np.inf


def test_rint() -> None:
    values = np.concatenate([np.arange(-130, 130, 0.25), [0.49999997, -0.49999997, np.inf, -np.inf, np.nan]])
    np.testing.assert_array_equal(jax.jit(rint)(values.astype(np.float32)), np.rint(values.astype(np.float32)))


def test_clamp_keeps_nan() -> None:
    values = np.array([-3, -2, 0.5, 2, 3, np.inf, -np.inf, np.nan], np.float32)
    want = np.array([-2, -2, 0.5, 2, 2, 2, -2, np.nan], np.float32)
    np.testing.assert_array_equal(clamp(jnp.asarray(values), -2.0, 2.0), want)


def test_powers_of_two_from_their_exponents() -> None:
    exponents = np.arange(1, 255, dtype=np.int32)
    powers = from_exponent(jnp.asarray(exponents))
    np.testing.assert_array_equal(powers, np.float32(2.0) ** (exponents - 127.0))
    np.testing.assert_array_equal(bits_of(powers), exponents << 23)
