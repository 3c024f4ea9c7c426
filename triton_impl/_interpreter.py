"""Triton's interpreter without work whose result nothing uses, which took two thirds of a kernel's time.

The launch of a kernel puts the interpreter's functions in place of the language's, and takes them back at its end. The
interpreter does the first once more for each function that the kernel calls. And it computes each sum, difference and
product of integers in 64 bits too, for an assertion that only debugging makes; a compiler leaves both away then.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from inspect import ismodule
from typing import Any

import triton.language as tl
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


def install() -> None:
    """Let all interpreted kernels of this process run so."""
    if not interpreter_builder.options.debug:
        interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
    InterpretedFunction.__call__ = call_once_replaced(InterpretedFunction.__call__)
