"""The weights of accelerated Gated DeltaNet layers, which are the layer's own; copies, pickles and removal."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import polyfuse
from polyfuse._torch.projections import as_one_weight
from polyfuse.integrations.transformers import accelerate, projection_weights, report, restore, stack_projections
from polyfuse.integrations.transformers._gated_delta_net import gated_delta_nets, is_fused
from tests.integrations.transformers.gated_delta_net_models import (
    BOUND,
    FAMILIES,
    PREFILL,
    build,
    build_layer,
    change,
    hidden,
    logits,
    tokens,
    write,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ops_are_given_the_parameters_themselves(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, op = accelerate(build_layer(family)), polyfuse.gdn_in_proj
    given: list[torch.Tensor] = []

    def record(x: torch.Tensor, **weights: torch.Tensor) -> Any:
        given.extend(weights.values())
        return op(x, **weights)

    monkeypatch.setattr(polyfuse, "gdn_in_proj", record)
    with torch.no_grad():
        layer(hidden(2, 3))
    names = ("qkvz", "ba") if family == "Qwen3Next" else ("qkv", "z", "b", "a")
    assert all(weight is getattr(layer, f"in_proj_{name}").weight for weight, name in zip(given, names, strict=True))


def test_the_layer_keeps_its_parameters_and_restore_leaves_nothing() -> None:
    model = build()
    layer, *_ = gated_delta_nets(model).values()
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


def test_a_layer_that_is_loaded_after_accelerate_is_fused_then(op_calls: list[str]) -> None:
    wanted = build()
    with torch.device("meta"):
        model = build()
    accelerate(model)
    assert {part.reason for part in report(model).parts} == {"has weights that are not plain parameters"}
    model.to_empty(device="cpu")
    model.load_state_dict(wanted.state_dict())
    for name, buffer in wanted.named_buffers():
        model.get_buffer(name).copy_(buffer)
    assert change(logits(wanted, tokens(2, 9)), logits(model, tokens(2, 9))) <= BOUND
    assert op_calls == PREFILL * 2
    assert all(part.fused for part in report(model).parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_projections_are_one_matrix_that_follows_the_weights(family: str, tmp_path: Path) -> None:
    model, plain = build(family), build(family)
    parameters = dict(model.named_parameters())
    assert stack_projections(accelerate(model)) is model
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    layers = gated_delta_nets(model).values()
    assert all(as_one_weight(*projection_weights(layer).values()) is not None for layer in layers)
    for changed in (model, plain):
        for parameter in changed.parameters():
            parameter.data.mul_(1.25)
    assert change(logits(plain, tokens(2, 9)), logits(model, tokens(2, 9))) <= BOUND
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert change(logits(plain, tokens(2, 9)), logits(loaded, tokens(2, 9))) <= BOUND
    model.load_state_dict({name: value.clone() for name, value in plain.state_dict().items()}, assign=True)
    assert all(as_one_weight(*projection_weights(layer).values()) is None for layer in layers)
    assert change(logits(plain, tokens(2, 9)), logits(model, tokens(2, 9))) <= BOUND


def test_projections_that_are_not_plain_are_not_stacked() -> None:
    model = build()
    first, second = gated_delta_nets(model).values()
    second.in_proj_z.register_forward_hook(lambda *_: None)
    message = r"model\.layers\.2\.linear_attn: expected a layer with plain weights, got a Linear of it has hooks"
    with pytest.raises(polyfuse.SpecError, match=message):
        stack_projections(model)
    assert as_one_weight(*projection_weights(first).values()) is None
    with pytest.raises(polyfuse.SpecError, match="expected a Gated DeltaNet layer in it, got Linear"):
        stack_projections(torch.nn.Linear(2, 2))
