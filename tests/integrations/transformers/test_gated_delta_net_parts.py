"""Norms and functions that somebody has put into a Gated DeltaNet layer or its model's file: they are what runs."""

import copy
import functools
import sys
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

from polyfuse.integrations.transformers import accelerate, report
from polyfuse.integrations.transformers._gated_delta_net_checks import FUNCTIONS
from tests.integrations.transformers.gated_delta_net_models import (
    BOUND,
    DECODE,
    FAMILIES,
    KINDS,
    MODELING,
    PREFILL,
    build,
    build_layer,
    change,
    hidden,
    states,
)

LENGTHS = (5, 1, 3, 1, 1)
BY_MODULE = [*PREFILL[:-1]] * len(LENGTHS)  # the norm is the module's own, in decode too


class DoubledNorm(nn.Module):
    """A norm of another class, which takes rows as Transformers gives them."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        rows, width = hidden_states.shape
        assert gate.shape == (rows, width)
        return 2 * self.norm(hidden_states, gate)


def another_class(layer: Any) -> None:
    layer.norm = DoubledNorm(layer.norm)


def hook(layer: Any) -> None:
    layer.norm.register_forward_hook(lambda module, args, output: 2 * output)


def another_forward(layer: Any) -> None:
    own = type(layer.norm).forward
    layer.norm.forward = MethodType(lambda self, x, gate: 2 * own(self, x, gate), layer.norm)


def no_epsilon(layer: Any) -> None:
    layer.norm.variance_epsilon = 0.0


def steps(layer: Any, cache: Any) -> torch.Tensor:
    x = [hidden(2, length, seed=seed) for seed, length in enumerate(LENGTHS)]
    with torch.no_grad():
        return torch.cat([layer(part, cache) for part in x], dim=1)


def check_against_untouched(family: str, layer: Any) -> None:
    config = build(family, kinds=KINDS[:1]).config
    old, new = (transformers.DynamicCache(config=config) for _ in range(2))
    before = steps(layer, old)
    assert change(before, steps(accelerate(copy.deepcopy(layer)), new)) <= BOUND
    assert all(change(a, b) <= BOUND for a, b in zip(states(old), states(new), strict=True))


@pytest.mark.parametrize("alter", [another_class, hook, another_forward, no_epsilon])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_that_is_not_plain_is_called(family: str, alter: Any, op_calls: list[str]) -> None:
    layer = build_layer(family)
    nn.init.normal_(layer.norm.weight)
    alter(layer)
    check_against_untouched(family, layer)
    assert op_calls == BY_MODULE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_of_the_norms_class_is_replaced(family: str, op_calls: list[str], monkeypatch: Any) -> None:
    layer = build_layer(family)
    own = type(layer.norm).forward
    monkeypatch.setattr(type(layer.norm), "forward", lambda self, x, gate: 2 * own(self, x, gate))
    check_against_untouched(family, layer)
    assert op_calls == BY_MODULE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sigmoid_gate_is_no_silu_in_decode_either(family: str, op_calls: list[str]) -> None:
    layer = build_layer(family)
    layer.norm.activation = "sigmoid"
    check_against_untouched(family, layer)
    assert op_calls == PREFILL * len(LENGTHS)


def as_function(own: Any) -> Any:
    @functools.wraps(own)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return replaced


class Wrapper:
    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs)


@pytest.mark.parametrize("make", [as_function, functools.partial, Wrapper])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_replaced_function_is_what_the_layer_calls(name: str, make: Any, op_calls: list[str]) -> None:
    layer, names = build_layer(), sys.modules[MODELING]
    config = build(kinds=KINDS[:1]).config
    before = steps(layer, transformers.DynamicCache(config=config))
    accelerate(layer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, name, make(getattr(names, name)))
        assert torch.equal(before, steps(layer, transformers.DynamicCache(config=config)))
        assert report(layer).parts[0].reason == f"calls a replaced {name}"
    assert report(layer).parts[0].unfused_calls == {f"calls a replaced {name}": len(LENGTHS)}
    assert not op_calls
    assert change(before, steps(layer, transformers.DynamicCache(config=config))) <= BOUND
    assert report(layer).parts[0].fused_calls == len(LENGTHS)
    assert op_calls == PREFILL + DECODE + PREFILL + DECODE * 2


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_the_kernels_package_wraps_is_transformers_own(name: str, monkeypatch: Any) -> None:
    own = getattr(sys.modules[MODELING], name)

    class Func(nn.Module):
        __module__ = "kernels.layer.layer"

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs)

    monkeypatch.setattr(f"{MODELING}.{name}", Func())
    assert report(accelerate(build_layer())).parts[0].fused
