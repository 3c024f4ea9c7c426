"""The stacked weights of Gated DeltaNet layers: their order, when they follow the layer's own, copies and removal."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import polyfuse
from polyfuse._torch.projections import as_one_weight
from polyfuse.integrations.transformers import accelerate, restore
from polyfuse.integrations.transformers._gated_delta_net import gated_delta_nets, is_fused
from tests.integrations.transformers.gated_delta_net_models import (
    BOUND,
    FAMILIES,
    build,
    build_layer,
    change,
    hidden,
    logits,
    tokens,
    write,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_stacked_in_the_order_of_the_ops(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, op = accelerate(build_layer(family)), polyfuse.gdn_in_proj
    given: list[torch.Tensor] = []

    def record(x: torch.Tensor, *weights: torch.Tensor) -> Any:
        given.extend(weights)
        return op(x, *weights)

    monkeypatch.setattr(polyfuse, "gdn_in_proj", record)
    with torch.no_grad():
        layer(hidden(2, 3))
    assert as_one_weight(*given).data_ptr() == layer.polyfuse_in_proj.data_ptr()
    if family != "Qwen3Next":
        parts = [getattr(layer, f"in_proj_{name}").weight for name in ("qkv", "z", "b", "a")]
        assert torch.equal(torch.cat(parts), layer.polyfuse_in_proj)
        return
    x = hidden(1, 1)
    query, key, value, z, b, a = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x), layer.in_proj_ba(x))
    wanted = torch.cat([part.flatten() for part in (query, key, value, z, b, a)])
    torch.testing.assert_close(layer.polyfuse_in_proj @ x.flatten(), wanted, rtol=1e-5, atol=1e-5)


def replace(layer: Any) -> None:
    layer.in_proj_z.weight = nn.Parameter(layer.in_proj_z.weight.detach() * 2)


def load(layer: Any) -> None:
    layer.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()})


def move(layer: Any) -> None:
    layer.to(torch.bfloat16)


def write_uncounted(layer: Any) -> None:
    layer.in_proj_z.weight.data.mul_(2)
    accelerate(layer)


@pytest.mark.parametrize("alter", [write, replace, load, move, write_uncounted])
def test_weights_are_stacked_again_when_they_change(alter: Any, op_calls: list[str]) -> None:
    layer = build_layer()
    twin = accelerate(copy.deepcopy(layer))
    with torch.no_grad():
        twin(hidden(2, 9))
        stack = twin.polyfuse_in_proj
        twin(hidden(2, 9))
        assert twin.polyfuse_in_proj is stack
    for module in (layer, twin):
        alter(module)
    x = hidden(2, 9, layer.in_proj_z.weight.dtype)
    bound = BOUND if x.dtype is torch.float32 else 2.0**-6
    with torch.no_grad():
        wanted = type(layer).forward(layer, x)
        assert change(wanted, twin(x)) <= bound
    assert len(op_calls) == 6


def test_the_layer_keeps_its_parameters_and_restore_leaves_nothing() -> None:
    model = build()
    layer = gated_delta_nets(model)[0]
    attributes, keys, parameters = set(vars(layer)), list(model.state_dict()), dict(model.named_parameters())
    before = logits(model, tokens(2, 9))
    accelerate(model)
    logits(model, tokens(2, 9))
    assert list(model.state_dict()) == keys
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert restore(model) is model
    assert set(vars(layer)) == attributes
    assert not list(layer.buffers())
    assert torch.equal(before, logits(model, tokens(2, 9)))


def test_a_copy_is_independent_and_a_pickle_plain() -> None:
    layer = accelerate(build_layer())
    with torch.no_grad():
        before = layer(hidden(2, 9))
        twin = copy.deepcopy(layer)
        stored = pickle.loads(pickle.dumps(layer))
        write(layer)
        layer(hidden(2, 9))
        assert is_fused(twin)
        assert torch.equal(before, twin(hidden(2, 9)))
        assert not is_fused(stored)
        assert change(before, stored(hidden(2, 9))) <= BOUND
        assert torch.equal(before, accelerate(stored)(hidden(2, 9)))


def test_layers_that_are_not_loaded_are_left_alone() -> None:
    with torch.device("meta"):
        model = build()
    assert not gated_delta_nets(model)
