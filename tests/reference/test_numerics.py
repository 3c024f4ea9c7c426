"""The oracle's rounding: many numbers at a time are rounded as each alone, whatever their strides."""

import numpy as np
import pytest

from polyfuse.reference._numerics import BLOCK, round_to


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float32"])
def test_more_numbers_than_a_block_are_rounded_as_one_by_one(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal((3, BLOCK + 5)) * 2.0 ** np.linspace(-150, 130, BLOCK + 5)
    values[1, 7], values[2, BLOCK], values[0, BLOCK + 4] = np.nan, np.inf, -np.inf
    whole = round_to(values.T, dtype)
    assert (whole.shape, whole.dtype.name) == ((BLOCK + 5, 3), dtype)
    for place in (0, 7, BLOCK - 1, BLOCK, BLOCK + 4):
        alone = np.stack([round_to(number, dtype) for number in values.T[place]])
        assert whole[place].tobytes() == alone.tobytes()


def test_no_numbers() -> None:
    assert round_to(np.zeros((3, 0)), "bfloat16").shape == (3, 0)
