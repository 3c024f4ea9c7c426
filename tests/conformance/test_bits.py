"""What differs between two calls, where an element of a result holds several numbers."""

import numpy as np

from polyfuse.conformance.bits import anything, unequal
from polyfuse.reference import Exact
from polyfuse.spec import Output


def free(*numbers: bool, parts: str) -> np.ndarray:
    """Which numbers of one row may hold anything."""
    ends = np.where([numbers], np.inf, 0.0)
    return anything(Exact(np.zeros((1, len(numbers))), -ends, ends, parts=parts))


def test_halves_of_bytes_are_told_apart() -> None:
    wanted = [Output("q", (1, 2), "uint8")]
    before, now = np.array([[0x21, 0x43]], np.uint8), np.array([[0x21, 0x53]], np.uint8)
    last, third = (free(*numbers, parts="float4_e2m1fn") for numbers in ((0, 0, 0, 1), (0, 0, 1, 0)))
    assert list(unequal(wanted, [before], [now], [last])) == []
    assert list(unequal(wanted, [before], [now], [third])) == [
        "q: 1 of 4 elements have other bits; at [0, 3] was 2, is 3"
    ]


def test_no_rows_of_halves_are_the_same() -> None:
    wanted, nothing = [Output("q", (0, 32), "uint8")], np.zeros((0, 32), np.uint8)
    assert list(unequal(wanted, [nothing], [nothing], [np.zeros((0, 64), np.bool_)])) == []


def test_bytes_of_an_int32_are_told_apart() -> None:
    wanted = [Output("scale", (1, 2), "int32")]
    before, now = np.array([[1, 2]], np.int32), np.array([[1 + (7 << 8), 2]], np.int32)
    second, first = (free(*numbers, *[0] * 6, parts="uint8") for numbers in ((0, 1), (1, 0)))
    assert list(unequal(wanted, [before], [now], [second])) == []
    assert list(unequal(wanted, [before], [now], [first])) == [
        "scale: 1 of 8 elements have other bits; at [0, 1] was 0, is 7"
    ]
