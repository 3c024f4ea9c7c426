"""Each check rejects a mistake of its kind, and leaves right calls of an unusual form alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from polyfuse.configs import level
from polyfuse.conformance import Trial, cases
from polyfuse.dispatch import Backend, Implementation, registry
from polyfuse.dispatch._plan import forget_plans

OP = "gated_rms_norm"
EVERYWHERE = level("standard").model_copy(update={"check_sample": 1})
Function = Callable[..., Any]


def in_place(right: Function) -> Function:
    def function(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return x.copy_(right(x, *args, **kwargs)).view_as(x)

    return function


def one_buffer(right: Function) -> Function:
    buffers: dict[Any, torch.Tensor] = {}

    def function(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        y = right(x, *args, **kwargs)
        return buffers.setdefault((y.shape, y.dtype), torch.empty_like(y)).copy_(y)

    return function


def first_weight_kept(right: Function) -> Function:
    weights: dict[Any, torch.Tensor] = {}

    def function(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        key = tuple(weight.shape), weight.dtype, weight.data_ptr()
        return right(x, gate, weights.setdefault(key, weight.clone()), *args, **kwargs)

    return function


def other_values_from_32_rows(right: Function) -> Function:
    def function(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        y = right(x, *args, **kwargs)
        return torch.nextafter(y, torch.zeros_like(y)) if y.dtype == torch.float32 and len(y) >= 32 else y

    return function


def reads_the_storage(right: Function) -> Function:
    def function(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return right(x.as_strided(x.shape, x.stride(), 0), *args, **kwargs)

    return function


def unwritten_memory(right: Function) -> Function:
    def function(*args: Any, **kwargs: Any) -> Any:
        y = right(*args, **kwargs)
        return y + 0 * torch.empty_like(y)

    return function


def gradients_left_off(right: Function) -> Function:
    def function(*args: Any, **kwargs: Any) -> Any:
        torch.set_grad_enabled(False)
        return right(*args, **kwargs)

    return function


MISTAKES = {
    "results": in_place,
    "inputs": in_place,
    "again": one_buffer,
    "alone": other_values_from_32_rows,
    "memory": reads_the_storage,
    "contexts": gradients_left_off,
}


@pytest.fixture(autouse=True)
def settings() -> Any:
    before = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(before)
    forget_plans()


def verdict(monkeypatch: pytest.MonkeyPatch, make: Callable[[Function], Function]) -> Any:
    right = registry().get("torch").load(OP)
    mine = Implementation(make(right.function), right.capability)
    monkeypatch.setattr(Backend, "load", lambda self, op: mine)
    forget_plans()
    case = next(case for case in cases(OP) if case.name == "float32-sigmoid-offset_1.0")
    return Trial(OP, case, 0).result(registry().get("torch"), "cpu", EVERYWHERE)


@pytest.mark.parametrize("check", MISTAKES)
def test_a_mistake_of_its_kind_is_rejected(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdict(monkeypatch, MISTAKES[check])
    assert found.status == "failed"
    assert check in found.checks, found.detail


@pytest.mark.parametrize(("mistake", "check"), [(first_weight_kept, "again"), (unwritten_memory, "memory")])
def test_others_of_a_kind(mistake: Any, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check in verdict(monkeypatch, mistake).checks


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("silu_mul_block_quant", "experts-float32-row_major"),  # num_rows, of experts and not of rows
        ("gated_rms_norm", "lead_"),  # no leading dimensions
        ("gdn_decode", "tokens_2-int32-accepted"),  # num_accepted, of sequences
        ("gdn_in_proj", "float16-merged"),  # weights in one buffer, under autocast
    ],
)
def test_a_right_call_of_an_unusual_form_passes_every_check(op: str, name: str) -> None:
    case = next(case for case in cases(op) if case.name == name)
    found = Trial(op, case, 0).result(registry().get("torch"), "cpu", EVERYWHERE)
    assert found.status == "passed", found.detail
