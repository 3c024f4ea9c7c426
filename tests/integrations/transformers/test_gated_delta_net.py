"""Gated DeltaNet layers of Qwen3-Next, Qwen3.5 and Qwen3.5-MoE on the ops, against the same layers as they are."""

import copy
import math
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

from polyfuse.integrations.transformers import _gated_delta_net_checks, accelerate, report
from tests.integrations.transformers.gated_delta_net_models import (
    BOUND,
    DECODE,
    FAMILIES,
    KINDS,
    PREFILL,
    build,
    build_layer,
    change,
    hidden,
    in_parts,
    logits,
    states,
    tokens,
)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 21), (2, 130)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers_within_rounding(family: str, shape: tuple[int, int], op_calls: list[str]) -> None:
    model = build(family)
    before = logits(model, tokens(*shape))
    assert accelerate(model) is model
    assert change(before, logits(model, tokens(*shape))) <= BOUND
    assert op_calls == PREFILL * 2
    with torch.no_grad():
        model.model.layers[0].linear_attn.conv1d.weight[-1] *= 1.01
    assert change(before, logits(model, tokens(*shape))) > BOUND


@pytest.mark.parametrize("models", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_bfloat16_is_as_accurate_as_transformers(models: int) -> None:
    """Over random models, in prefill and decode: as the roundings are other ones, a single model may be worse."""
    ratios = []
    for family, seed in product(FAMILIES, range(models)):
        model, ids = build(family, torch.bfloat16, seed=seed), tokens(4, 64, seed)
        exact = in_parts(copy.deepcopy(model).float(), ids, [56, *[1] * 8])
        before = in_parts(model, ids, [56, *[1] * 8]) - exact
        after = in_parts(accelerate(model), ids, [56, *[1] * 8]) - exact
        ratios.append(float(after.norm() / before.norm()))
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) < 1


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_identical(family: str, padding: int, op_calls: list[str]) -> None:
    model, ids = build(family), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    before = model.generate(ids, **options)
    after = accelerate(model).generate(ids, **options)
    assert before.shape == (2, 33)
    assert torch.equal(before, after)
    assert op_calls == PREFILL * 2 + DECODE * 2 * 23


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_is_identical(family: str, op_calls: list[str]) -> None:
    model, options = build(family), {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    before = model.generate(tokens(2, 9), **options)
    assert torch.equal(before, accelerate(model).generate(tokens(2, 9), **options))
    assert op_calls == PREFILL * 2 + DECODE * 2 * 7


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_is_what_transformers_leaves(family: str) -> None:
    """Prefill, chunks of several tokens and single ones, from hidden states and weights with exact products."""
    layer, config = build_layer(family), build(family, kinds=KINDS[:1]).config
    for name, parameter in layer.named_parameters():
        if "in_proj" in name:
            parameter.data = torch.randint(-8, 9, parameter.shape).float() / 64
    accelerated = accelerate(copy.deepcopy(layer))
    old, new = (transformers.DynamicCache(config=config) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    for length in (2, 1, 7, 1, 1, 3):
        x = torch.randint(-8, 9, (3, length, 64), generator=generator).float()
        with torch.no_grad():
            before, after = layer(x, old), accelerated(x, new)
        assert change(before, after) <= BOUND
        (old_conv, old_recurrent), (new_conv, new_recurrent) = states(old), states(new)
        assert torch.equal(old_conv, new_conv)
        assert (new_conv.shape, new_conv.dtype) == ((3, 128, 4), torch.float32)
        assert (new_recurrent.shape, new_recurrent.dtype) == (old_recurrent.shape, old_recurrent.dtype)
        assert change(old_recurrent, new_recurrent) <= BOUND
    assert new.layers[0].has_previous_state == old.layers[0].has_previous_state


def test_gradients_are_transformers() -> None:
    layer = build_layer()
    accelerated = accelerate(copy.deepcopy(layer))
    for module in (layer, accelerated):
        module(hidden(2, 9)).square().sum().backward()
    pairs = zip(layer.named_parameters(), accelerated.named_parameters(), strict=True)
    assert all(a == b and torch.equal(p.grad, q.grad) for (a, p), (b, q) in pairs)


class Adapter(nn.Linear):
    """A linear layer that adds something of its own, as LoRA does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


def adapt(layer: Any) -> None:
    layer.in_proj_z.__class__ = Adapter


def hook(layer: Any) -> None:
    layer.in_proj_qkv.register_forward_hook(lambda module, args, output: output * 2)


def change_activation(layer: Any) -> None:
    layer.activation = "gelu"


class Quantised(nn.Parameter):
    """A weight with arithmetic of its own."""


def quantise(layer: Any) -> None:
    layer.in_proj_b.weight = Quantised(layer.in_proj_b.weight.detach())


@pytest.mark.parametrize("alter", [adapt, hook, quantise, change_activation, nn.Module.train])
def test_a_layer_that_the_ops_do_not_cover_runs_as_before(alter: Any, op_calls: list[str]) -> None:
    layer = build_layer()
    alter(layer)
    with torch.no_grad():
        before = layer(hidden(2, 9))
        after = accelerate(layer)(hidden(2, 9))
    assert torch.equal(before, after)
    assert not op_calls


@pytest.mark.parametrize("case", ["grad", "autocast", "seq_idx", "record_past"])
def test_a_call_that_the_ops_do_not_cover_runs_as_before(case: str, op_calls: list[str]) -> None:
    layer, config = build_layer(), build(kinds=KINDS[:1]).config
    arguments: dict[str, Any] = {"seq_idx": torch.zeros(2, 9, dtype=torch.int32)} if case == "seq_idx" else {}
    results: list[Any] = []
    for module in (layer, accelerate(copy.deepcopy(layer))):
        if case == "record_past":
            arguments["cache_params"] = transformers.DynamicCache(config=config)
            arguments["cache_params"].layers[0].activate_past_recording()
        with torch.set_grad_enabled(case == "grad"), torch.autocast("cpu", torch.bfloat16, case == "autocast"):
            try:
                results.append(module(hidden(2, 9), **arguments))
            except ValueError as error:  # what Transformers 5.24 says to seq_idx
                results.append(error)
    if case == "seq_idx" and transformers.__version__ >= "5.24":
        assert str(results[0]) == str(results[1])
    else:
        assert torch.equal(*results)
        assert results[1].requires_grad == (case == "grad")
    assert not op_calls


def test_a_layer_that_is_offloaded_later_runs_as_before(op_calls: list[str]) -> None:
    layer = build_layer()
    with torch.no_grad():
        before = layer(hidden(2, 9))
        accelerate(layer)
        for name in ("qkv", "z", "b", "a"):
            projection = getattr(layer, f"in_proj_{name}")
            projection.forward = partial(nn.functional.linear, weight=projection.weight)
            projection.weight = nn.Parameter(projection.weight.to("meta"))
        assert torch.equal(before, layer(hidden(2, 9)))
    assert not op_calls


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_keyword_is_the_layers_own_to_understand(family: str, op_calls: list[str]) -> None:
    layer = build_layer(family)
    own = type(layer).forward
    with torch.no_grad():
        before = own(layer, hidden(2, 9), a_later_option=True)
        accelerate(layer)
        assert torch.equal(before, layer(hidden(2, 9), a_later_option=True))
    assert report(layer).parts[0].unfused_calls == {"unknown keywords: a_later_option": 1}
    assert not op_calls


def test_a_class_with_another_signature_runs_its_own_forward(op_calls: list[str], monkeypatch: Any) -> None:
    """What a later version of Transformers may do: a layer that takes its cache as a pair of states."""
    layer = build_layer()
    cls = type(layer)

    def forward(self: Any, hidden_states: Any, states: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return hidden_states if states is None else states

    forward.__module__ = cls.__module__
    monkeypatch.setattr(cls, "forward", forward)
    _gated_delta_net_checks._parameters.cache_clear()
    try:
        with torch.no_grad():
            assert torch.equal(accelerate(layer)(hidden(1, 2)), hidden(1, 2))
            assert layer(hidden(1, 2), 3) == 3
        assert report(layer).parts[0].reason == "its forward has another signature"
    finally:
        _gated_delta_net_checks._parameters.cache_clear()
    assert not op_calls


def test_the_cache_may_have_either_name(op_calls: list[str]) -> None:
    layer, config = accelerate(build_layer()), build(kinds=KINDS[:1]).config
    results = []
    for given in ({"cache_params": 0}, {"cache": 0}, {}):
        cache = transformers.DynamicCache(config=config)
        with torch.no_grad():
            layer(hidden(1, 5), *([] if given else [cache]), **dict.fromkeys(given, cache))
            results.append(layer(hidden(1, 1), *([] if given else [cache]), **dict.fromkeys(given, cache)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert op_calls == (PREFILL + DECODE) * 3


def test_a_forward_that_is_replaced_on_the_class_is_what_runs(op_calls: list[str], monkeypatch: Any) -> None:
    layer = accelerate(build_layer())
    cls = type(layer)
    own = cls.forward

    def forward(
        self: Any, hidden_states: Any, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        return 2 * own(self, hidden_states, cache_params, attention_mask, **kwargs)

    with torch.no_grad():
        before = own(layer, hidden(2, 9))
        monkeypatch.setattr(cls, "forward", forward)
        assert torch.equal(2 * before, layer(hidden(2, 9)))
    assert report(layer).parts[0].reason == "its class has another forward"
    assert not op_calls
