"""The interpreter replaces the language once for each launch, and finds out once what a type says."""

from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

import polyfuse
from polyfuse.triton_impl._common import INTERPRETED, widen
from polyfuse.triton_impl._interpreter import call_once_replaced, known_blocks, known_dtypes, known_shapes

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


def test_overflow_is_computed_only_where_it_is_asserted() -> None:
    options = interpreter.interpreter_builder.options
    assert options.sanitize_overflow == options.debug


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
    find = known_dtypes(lambda kind: asked.append(kind) or str(kind))
    block = tl.block_type(tl.int8, [2])
    assert [find(tl.int8), find(block), find(tl.pointer_type(tl.int8))] == ["int8", "int8", "pointer<int8>"]
    assert asked == [tl.int8, tl.pointer_type(tl.int8)]
