"""The interpreter replaces the language once for each launch, not for each function that a kernel calls."""

from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

import polyfuse
from polyfuse.triton_impl._common import INTERPRETED, widen
from polyfuse.triton_impl._interpreter import call_once_replaced

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
