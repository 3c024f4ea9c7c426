"""The comparison and the exact rounding under it."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyfuse.conformance import compare
from polyfuse.reference._numerics import Exact, round_to

DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"]


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_value_of_a_dtype_rounds_to_itself(dtype):
    target = np.dtype(getattr(ml_dtypes, dtype, dtype))
    bits = np.arange(2 ** (8 * target.itemsize), dtype=f"u{target.itemsize}").view(target)
    with np.errstate(invalid="ignore"):
        values = bits.astype(np.float64)
    back = round_to(values, dtype)
    finite = ~np.isnan(values)
    assert (back.view(f"u{target.itemsize}") == bits.view(f"u{target.itemsize}"))[finite].all()
    assert np.isnan(back[~finite].astype(np.float64)).all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_ties_go_to_even_and_neighbours_to_the_nearest(dtype):
    target = np.dtype(getattr(ml_dtypes, dtype, dtype))
    with np.errstate(invalid="ignore"):
        bits = np.arange(2 ** (8 * target.itemsize - 1), dtype=f"u{target.itemsize}")
        positive = bits.view(target).astype(np.float64)
    values = np.sort(positive[np.isfinite(positive)])
    low, high = values[:-1], values[1:]
    middle = (low + high) / 2
    even = np.where(np.arange(len(low)) % 2 == 0, low, high)
    assert (round_to(middle, dtype).astype(np.float64) == even).all()
    assert (round_to(np.nextafter(middle, 0), dtype).astype(np.float64) == low).all()
    assert (round_to(np.nextafter(middle, np.inf), dtype).astype(np.float64) == high).all()


@given(st.floats(allow_nan=False, allow_infinity=False, width=64))
def test_float32_and_float16_agree_with_numpy(value):
    with np.errstate(over="ignore", under="ignore"):
        for dtype in ("float32", "float16"):
            assert round_to(np.array([value]), dtype)[0] == np.array([value]).astype(dtype)[0]


def test_bfloat16_is_rounded_once():
    """1 + 2**-8 + 2**-40 is above the tie; by way of float32 it would land on it, and go to even."""
    assert float(round_to(np.array([1 + 2.0**-8 + 2.0**-40]), "bfloat16")[0]) == 1 + 2.0**-7


def test_integers_saturate_and_tie_to_even():
    assert list(round_to(np.array([0.5, 1.5, -2.5, 127.4, 300.0, -300.0]), "int8")) == [0, 2, -2, 127, 127, -128]


EXACT = Exact.around(np.array([1.0, 2.0, np.nan, np.inf, 0.0]), np.array([1e-6, 0.0, 0.0, 0.0, 0.0]))
RIGHT = np.array([1.0, 2.0, np.nan, np.inf, 0.0], np.float32)


@pytest.mark.parametrize(
    ("index", "value", "right"),
    [
        (0, 1 + 9e-7, True),
        (0, 1 + 2e-6, False),
        (1, np.nextafter(np.float32(2), np.float32(3)), False),
        (2, 1.0, False),
        (0, np.nan, False),
        (3, np.finfo(np.float32).max, False),
        (3, -np.inf, False),
        (4, -0.0, True),
    ],
)
def test_an_element_is_right_inside_its_interval_only(index, value, right):
    got = RIGHT.copy()
    got[index] = value
    assert (compare("out", got, EXACT, "float32") is None) == right


def test_the_message_names_the_worst_element():
    got = RIGHT.copy()
    got[:2] = 1.5, 4.0
    assert compare("out", got, EXACT, "float32") == (
        "out: 2 of 5 elements wrong; at [1] expected 2 to 2 (exact 2), got 4"
    )
    assert compare("out", got[:2], EXACT, "float32") == "out: expected shape [5], got [2]"
    assert compare("out", got, EXACT, "float16") == "out: expected dtype float16, got float32"


def test_a_copy_keeps_the_sign_of_zero():
    assert compare("v", np.array([-0.0], np.float32), Exact.copy(np.array([0.0]), 0), "float32") is not None
    assert compare("v", np.array([-0.0], np.float32), Exact.copy(np.array([-0.0]), 0), "float32") is None


def test_unwritten_elements_may_hold_anything():
    anything = Exact(np.zeros(2), np.array([-np.inf, 0.0]), np.array([np.inf, 0.0]))
    assert compare("q", np.array([np.nan, 0.0], np.float32), anything, "float32") is None
    assert compare("q", np.array([np.nan, 1.0], np.float32), anything, "float32") is not None
    signalling = np.array([0x7F800001, 0], np.uint32).view(np.float32)
    assert compare("q", signalling, anything, "float32") is None


def test_packed_bytes_are_compared_as_numbers():
    exact = Exact(*(np.array([[127.0, 128.0, 1.0, 0.0]]),) * 3, as_bytes=True)
    assert compare("scale", np.array([[127 | 128 << 8 | 1 << 16]], np.int32), exact, "int32") is None
    wrong = compare("scale", np.array([[128 | 127 << 8 | 1 << 16]], np.int32), exact, "int32")
    assert wrong is not None
    assert "2 of 4 elements wrong" in wrong
