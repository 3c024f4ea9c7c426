"""Triton's interpreter without work whose result nothing uses, or is known, which took most of a kernel's time.

The launch of a kernel puts the interpreter's functions in place of the language's, and takes them back at its end. The
interpreter does the first once more for each function that the kernel calls. It computes each sum, difference and
product of integers in 64 bits too, for an assertion that only debugging makes. And it finds out anew for each value
what its type says: a compiler does all of that once.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from inspect import ismodule
from threading import Lock
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder


@cache
def _languages(function: Callable[..., Any]) -> tuple[Any, ...]:
    """The modules of the language that a function's code can name."""
    values = getattr(function, "__globals__", {}).values()
    return tuple(value for value in values if ismodule(value) and value in (tl, tl.core))


def _is_replaced(language: Any) -> bool:
    """Whether a module of the language has the interpreter's functions now: they lack the mark of Triton's own."""
    return not tl.core.is_builtin(language.load)


def call_once_replaced(original: Callable[..., Any]) -> Callable[..., Any]:
    """What an interpreted function does when it is called, with `original` where the language has to be replaced."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not all(map(_is_replaced, _languages(self.fn))):
            return original(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    return call


def known_dtypes(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """NumPy's dtype of a type of the language, which `original` finds in a table that it makes for each value."""
    known: dict[str, Any] = {}

    def dtype(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = original(kind)
        return known[name]

    return dtype


def known_blocks(original: Callable[..., None]) -> Callable[..., None]:
    """How a type of blocks is made, with what `original` has found of that element and that shape before."""
    known: dict[Any, dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *[size.value if isinstance(size, tl.constexpr) else size for size in shape]
        if key not in known:
            original(self, element_ty, shape)
            known[key] = dict(vars(self))
        else:
            vars(self).update(known[key], element_ty=element_ty)

    return init


def known_shapes(original: Callable[..., None]) -> Callable[..., None]:
    """How a value is made, with what `original` has found of that shape before."""
    known: dict[Any, dict[str, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else None
        if key not in known:
            original(self, handle, type)
            known[key] = {name: x for name, x in vars(self).items() if name not in ("handle", "type", "dtype")}
        else:
            vars(self).update(known[key], handle=handle, type=type, dtype=type.scalar)

    return init


def known_promotions(original: Callable[..., Any]) -> Callable[..., Any]:
    """The type in which two others are computed, with what `original` has found of these before."""
    known: dict[Any, Any] = {}

    def promoted(self: Any, one: Any, one_is_scalar: bool, two: Any, two_is_scalar: bool, div_or_mod: bool) -> Any:
        key = one.name, one_is_scalar, two.name, two_is_scalar, div_or_mod
        if key not in known:
            known[key] = original(self, one, one_is_scalar, two, two_is_scalar, div_or_mod)
        return known[key]

    return promoted


def equal_sizes(original: Callable[..., Any]) -> Callable[..., Any]:
    """Whether two tuples are equal: `original` makes a third one first, for which there is no reason among integers."""

    def equal(self: Any, other: Any) -> Any:
        values = other.values if isinstance(other, tl.tuple) else other
        if isinstance(values, list) and all(type(value) is int for value in values):
            return tl.constexpr(self.values == values)
        return original(self, other)

    return equal


def equal_dtypes(self: Any, other: Any) -> bool:
    """Whether two types of elements are the same one."""
    if isinstance(other, tl.constexpr):
        other = other.value
    return isinstance(other, tl.dtype) and self.name == other.name


def equal_blocks(self: Any, other: Any) -> bool:
    """Whether two types of blocks are the same one, without a copy of their shapes."""
    same = isinstance(other, tl.block_type) and self.element_ty == other.element_ty
    return same and self.shape.values == other.shape.values


def _quicker() -> list[tuple[Any, str, Any]]:
    """What is put in place of an attribute of what."""
    options = interpreter_builder.options
    return [
        (interpreter_builder, "options", options if options.debug else replace(options, sanitize_overflow=False)),
        (InterpretedFunction, "__call__", call_once_replaced(InterpretedFunction.__call__)),
        (interpreter, "_get_np_dtype", known_dtypes(interpreter._get_np_dtype)),
        (tl.block_type, "__init__", known_blocks(tl.block_type.__init__)),
        (tl.block_type, "__eq__", equal_blocks),
        (tl.dtype, "__eq__", equal_dtypes),
        (tl.tuple, "__eq__", equal_sizes(tl.tuple.__eq__)),
        (TritonSemantic, "computation_type_impl", known_promotions(TritonSemantic.computation_type_impl)),
        (tl.tensor, "__init__", known_shapes(tl.tensor.__init__)),
    ]


class Quickly:
    """A context in which kernels are interpreted so; outside of it, for the kernels of others, all is as it was."""

    def __init__(self) -> None:
        self._quicker = _quicker()
        self._before = [(owner, name, getattr(owner, name)) for owner, name, _ in self._quicker]
        self._lock, self._inside = Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._put(self._quicker)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._put(self._before)

    def _put(self, attributes: list[tuple[Any, str, Any]]) -> None:
        for owner, name, value in attributes:
            setattr(owner, name, value)
