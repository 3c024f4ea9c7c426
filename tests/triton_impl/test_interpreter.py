"""The interpreter replaces the language once for each launch, and finds out once what a type says."""

from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

import polyfuse
from polyfuse.triton_impl import _common
from polyfuse.triton_impl._common import INTERPRETED, widen
from polyfuse.triton_impl._interpreter import (
    Quickly,
    call_once_replaced,
    equal_dtypes,
    known_blocks,
    known_dtypes,
    known_promotions,
    known_shapes,
)
from polyfuse.triton_impl.gated_rms_norm import gated_rms_norm

pytestmark = pytest.mark.skipif(not INTERPRETED.value, reason="kernels are compiled here")
X = torch.linspace(-3, 3, 64).view(2, 32)


def called() -> Any:
    return polyfuse.gated_rms_norm(X, X, torch.ones(32), backend="triton")


def test_functions_of_a_kernel_replace_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    want = called()  # after which the library's own functions have replaced their part for good
    replaced: list[str] = []
    original = interpreter._patch_lang

    def counted(function: Any) -> Any:
        replaced.append(function.__name__)
        return original(function)

    monkeypatch.setattr(interpreter, "_patch_lang", counted)
    assert torch.equal(called(), want)
    assert replaced == ["_kernel"]


def test_the_language_is_as_it_was_after_a_launch() -> None:
    called()
    assert tl.core.is_builtin(tl.load)


def test_kernels_of_others_are_interpreted_as_before() -> None:
    quickly = _common.interpreting
    assert isinstance(quickly, Quickly)

    def now() -> list[Any]:
        return [getattr(owner, name) for owner, name, _ in quickly._quicker]

    before = now()
    assert before == [value for _, _, value in quickly._before]
    with quickly:
        with quickly:  # as in another thread
            assert now() == [value for _, _, value in quickly._quicker]
        assert now() == [value for _, _, value in quickly._quicker]
        options = interpreter.interpreter_builder.options
        assert options.sanitize_overflow == options.debug
    assert now() == before


def test_a_launch_that_raises_leaves_nothing_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[bool] = []

    def raising(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside.append(tl.dtype.__eq__ is equal_dtypes)
        raise ValueError("no")

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", raising)
    with pytest.raises(ValueError, match="no"):
        gated_rms_norm(X, X, torch.ones(32))
    assert inside == [True]
    assert tl.dtype.__eq__ is not equal_dtypes


def test_outside_of_a_launch_a_function_replaces_the_language_itself() -> None:
    asked: list[Any] = []
    call = call_once_replaced(lambda function, *args: asked.append((function, args)))
    call(widen, 7)
    assert asked == [(widen, (7,))]


def test_a_block_of_a_known_shape_is_made_without_the_original() -> None:
    made: list[Any] = []

    def original(self: Any, element_ty: Any, shape: Any) -> None:
        made.append((element_ty.name, list(shape)))
        self.element_ty, self.shape, self.numel = element_ty, tl.tuple(shape), 8

    init = known_blocks(original)
    first, same, other = (tl.block_type.__new__(tl.block_type) for _ in range(3))
    init(first, tl.float32, [4, 2])
    init(same, tl.float32, tl.tuple([tl.constexpr(4), 2]))
    init(other, tl.bfloat16, [4, 2])
    assert made == [("fp32", [4, 2]), ("bf16", [4, 2])]
    assert same == first
    assert same.numel == 8
    assert other != first
    assert other.element_ty is tl.bfloat16


def test_a_shape_that_a_block_cannot_have_is_still_refused() -> None:
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(tl.float32, [3])
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(tl.float32, [3])


def test_a_value_of_a_known_shape_keeps_nothing_of_another_one() -> None:
    def original(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.shape if type.is_block() else (), 8

    init = known_shapes(original)
    first, second, scalar = (tl.tensor.__new__(tl.tensor) for _ in range(3))
    init(first, "one", tl.block_type(tl.float32, [8]))
    init(second, "two", tl.block_type(tl.int32, [8]))
    init(scalar, "three", tl.int32)
    assert (second.handle, second.type, second.dtype) == ("two", tl.block_type(tl.int32, [8]), tl.int32)
    assert [list(value.shape) for value in (first, second, scalar)] == [[8], [8], []]


def test_the_dtype_of_a_type_is_found_once() -> None:
    asked: list[Any] = []

    def original(kind: Any) -> str:
        asked.append(kind)
        return str(kind)

    find = known_dtypes(original)
    block = tl.block_type(tl.int8, [2])
    assert [find(tl.int8), find(block), find(tl.pointer_type(tl.int8))] == ["int8", "int8", "pointer<int8>"]
    assert asked == [tl.int8, tl.pointer_type(tl.int8)]


def test_the_type_of_a_sum_is_found_once_for_each_pair() -> None:
    asked: list[Any] = []

    def original(semantic: Any, *pair: Any) -> Any:
        asked.append(pair)
        return tl.float32

    promoted = known_promotions(original)
    sums = (tl.bfloat16, False, tl.int32, True, False)
    assert promoted(None, *sums) is promoted(None, *sums) is tl.float32
    promoted(None, *sums[:-1], True)
    assert asked == [sums, (*sums[:-1], True)]


@pytest.mark.parametrize(
    "other",
    [[4, 2], tl.tuple([4, 2]), tl.tuple([tl.constexpr(4), 2]), (4, 2)],
    ids=("list", "tl.tuple", "tl.tuple of a constexpr", "tuple"),  # some releases' tuples cannot be asked for a name
)
def test_sizes_are_compared_by_their_numbers(other: Any) -> None:
    for sizes in ([4, 2], [tl.constexpr(4), tl.constexpr(2)]):
        assert bool(tl.tuple(sizes) == other)
        assert not bool(tl.tuple(sizes) != other)
        assert not bool(tl.tuple([*sizes, 1]) == other)
        assert not bool(tl.tuple([2, 4]) == other)


def test_types_of_elements_are_compared_by_their_names() -> None:
    assert tl.float32 == tl.constexpr(tl.dtype("fp32"))
    assert tl.float32 != tl.float16
    assert tl.int8 != "int8"
