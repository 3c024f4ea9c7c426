"""The comparison and the exact rounding under it."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyfuse.conformance import cases, compare
from polyfuse.conformance.checks.values import Margin, margin, margins, problems, verdict
from polyfuse.conformance.inputs import make_inputs
from polyfuse.reference import oracle
from polyfuse.reference._numerics import Exact, round_to
from polyfuse.spec import OPS, bind

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
    exact = Exact(*(np.array([[127.0, 128.0, 1.0, 0.0]]),) * 3, parts="uint8")
    assert compare("scale", np.array([[127 | 128 << 8 | 1 << 16]], np.int32), exact, "int32") is None
    wrong = compare("scale", np.array([[128 | 127 << 8 | 1 << 16]], np.int32), exact, "int32")
    assert wrong is not None
    assert "2 of 4 elements wrong" in wrong


def test_halves_of_bytes_are_compared_as_numbers():
    """0.5 is code 1, -0.5 code 9, -0 code 8, 2 code 4 and 3 code 5; the first number is the low half."""
    low, high = np.array([[0.5, 0.0, 2.0, -0.5]]), np.array([[0.5, 0.0, 3.0, 0.0]])
    exact = Exact(low, low, high, parts="float4_e2m1fn")
    for right in ([0x01, 0x94], [0x81, 0x95], [0x01, 0x05], [0x01, 0x84]):
        assert compare("q", np.array([right], np.uint8), exact, "uint8") is None
    for wrong in ([0x10, 0x94], [0x71, 0x94], [0x01, 0x93], [0x01, 0x14], [0x01, 0xA4]):
        assert compare("q", np.array([wrong], np.uint8), exact, "uint8") is not None
    assert compare("q", np.array([[0x31, 0x95]], np.uint8), exact, "uint8") == (
        "q: 1 of 4 elements wrong; at [0, 1] expected 0 to 0 (exact 0), got 1.5"
    )
    assert compare("q", np.array([[0x01]], np.uint8), exact, "uint8") == "q: expected shape [1, 4], got [1, 2]"
    assert margin(np.array([[0x01, 0x95]], np.uint8), exact, "uint8") == Margin(0.5, (0, 2))


def test_a_wrong_sign_is_shown_in_bits():
    copy = Exact.copy(np.array([np.nan, 0.0]), 0)
    got = np.array([0xFFC0, 0x0000], np.uint16).view(ml_dtypes.bfloat16)
    assert compare("v", got, copy, "bfloat16") == (
        "v: 1 of 2 elements wrong; at [0] expected nan with the sign +, got the bits 0xffc0"
    )
    got = np.array([np.nan, -0.0], np.float16)
    assert compare("v", got, copy, "float16") == (
        "v: 1 of 2 elements wrong; at [1] expected 0 with the sign +, got the bits 0x8000"
    )


def test_a_margin_is_the_share_of_the_granted_error():
    """bfloat16 has 1, 1.0078125, ...: what lies within 0.00390625 of 1.0078125 is rounded to it."""
    exact = Exact.around(np.array([1.0, 1.0, 3.0, np.nan, np.inf]), np.array([0.0078125, 0.0078125, 0.0, 0.0, 0.0]))
    near = np.array([1.0, 1.0, 3.0, np.nan, np.inf]).astype(ml_dtypes.bfloat16)
    assert margin(near, exact, "bfloat16") == Margin(0.0, None)
    near[1] = 1.0078125
    assert margin(near, exact, "bfloat16") == Margin(0.5, (1,))
    near[0] = 0.9921875  # which reaches up to 0.994140625, 0.005859375 below 1
    assert margin(near, exact, "bfloat16") == Margin(0.75, (0,))
    near[2] = 3.015625
    assert margin(near, exact, "bfloat16") == Margin(np.inf, (2,))


def test_a_margin_of_what_overflows_and_of_integers():
    """float16 rounds to infinity from 65520 on."""
    exact = Exact.around(np.array([65500.0, 10.2]), np.array([40.0, 0.8]))
    assert margin(np.array([np.inf, 10.2], np.float16), exact, "float16") == Margin(0.5, (0,))
    assert margin(
        np.array([127, 11], np.int8), Exact.around(np.array([127.0, 10.2]), np.array([0.0, 0.6])), "int8"
    ) == (Margin(pytest.approx(0.5), (1,)))
    anything = Exact(np.zeros(1), np.array([-np.inf]), np.array([np.inf]))
    assert margin(np.array([7.0], np.float32), anything, "float32") == Margin(0.0, None)


def test_every_wrong_result_is_named():
    spec = OPS["gdn_post_conv"]
    made = make_inputs(spec, cases("gdn_post_conv")[0])
    call, exact = bind(spec, made), oracle("gdn_post_conv").intervals(**made)
    right = oracle("gdn_post_conv")(**made)
    assert list(problems(right, call, exact)) == []
    assert verdict(right, call, exact) is None
    wrong = [right[0], right[1] * 0, right[2], right[3] + 1, right[4]]
    assert [line.partition(":")[0] for line in problems(wrong, call, exact)] == ["k", "g"]
    found = margins(right, call, exact)
    assert set(found) == {"q", "k", "v", "g", "beta"}
    assert all(0 <= m.share <= 1 for m in found.values())
    assert list(problems(right[:2], call, exact)) == ["expected 5 outputs, got 2"]
