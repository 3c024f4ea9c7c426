"""Gated DeltaNet layers of Qwen3-Next, Qwen3.5 and Qwen3.5-MoE on the ops, against the same layers as they are."""

import copy
import pickle
import sys
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

import polyfuse
from polyfuse._torch.projections import as_one_weight
from polyfuse.integrations.transformers import accelerate, restore, stacked_weights
from polyfuse.integrations.transformers._gated_delta_net import gated_delta_nets, is_fused

MODELING = "transformers.models.qwen3_5.modeling_qwen3_5"
FAMILIES = {"Qwen3Next": "", "Qwen3_5": "Text", "Qwen3_5Moe": "Text"}
KINDS = ["linear_attention", "full_attention", "linear_attention"]
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY |= {"vocab_size": 97, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
TINY |= {"linear_value_head_dim": 16, "linear_conv_kernel_dim": 4}
# Every expert is used: a router that picks some turns a rounding into a jump.
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERTS |= {"shared_expert_intermediate_size": 32}

# Of the largest logit: sums of 64 to 96 terms in another order, 90 roundings at worst, in each of two layers.
BOUND = 1e-5
# Of the error that Transformers makes in bfloat16: as many roundings, not the same ones.
BFLOAT16 = 1.1


def build(family: str = "Qwen3_5", dtype: torch.dtype = torch.float32, kinds: list[str] = KINDS) -> Any:
    """A tiny model, with conv weights that make its layers matter."""
    config = getattr(transformers, f"{family}{FAMILIES[family]}Config")
    experts = {} if family == "Qwen3_5" else EXPERTS
    torch.manual_seed(0)
    settings = config(**TINY, **experts, layer_types=kinds, num_hidden_layers=len(kinds))
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(settings, dtype=dtype).eval()
    for layer in gated_delta_nets(model):
        nn.init.normal_(layer.conv1d.weight, std=0.5)
        nn.init.normal_(layer.out_proj.weight, std=0.5)
    return model


def build_layer(family: str = "Qwen3_5", dtype: torch.dtype = torch.float32) -> Any:
    return gated_delta_nets(build(family, dtype, KINDS[:1]))[0]


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def hidden(rows: int, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, length, 64, generator=torch.Generator().manual_seed(3)).to(dtype)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(ids, **kwargs).logits


def change(old: torch.Tensor, new: torch.Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return float((new.double() - old.double()).abs().max() / old.double().abs().max())


def states(cache: Any) -> list[torch.Tensor]:
    layers = [layer for layer in cache.layers if hasattr(layer, "conv_states")]
    return [state for layer in layers for state in (layer.conv_states[0], layer.recurrent_states[0])]


def spy(seen: list[Any], name: str, function: Any) -> Any:
    """The function, noting each call under a name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return function(*args, **kwargs)

    return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops in the order of their calls."""
    seen: list[str] = []
    for name in ("gdn_in_proj", "gdn_conv_prep"):
        monkeypatch.setattr(polyfuse, name, spy(seen, name, getattr(polyfuse, name)))
    return seen


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 21), (2, 130)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers_within_rounding(family: str, shape: tuple[int, int], calls: list[str]) -> None:
    model = build(family)
    before = logits(model, tokens(*shape))
    assert accelerate(model) is model
    assert change(before, logits(model, tokens(*shape))) <= BOUND
    assert calls == ["gdn_in_proj", "gdn_conv_prep"] * 2
    with torch.no_grad():
        model.model.layers[0].linear_attn.conv1d.weight[-1] *= 1.01
    assert change(before, logits(model, tokens(*shape))) > BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_accurate_as_transformers(family: str) -> None:
    model = build(family, torch.bfloat16)
    exact = logits(copy.deepcopy(model).float(), tokens(4, 64))
    before = logits(model, tokens(4, 64)) - exact
    after = logits(accelerate(model), tokens(4, 64)) - exact
    assert 0 < float(after.norm()) <= BFLOAT16 * float(before.norm())


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_identical(family: str, padding: int, calls: list[str]) -> None:
    model, ids = build(family), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    options = {"attention_mask": mask, "max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    before = model.generate(ids, **options)
    after = accelerate(model).generate(ids, **options)
    assert before.shape == (2, 73)
    assert torch.equal(before, after)
    assert len(calls) == 64 * 4


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_chunks_is_the_prompt(family: str) -> None:
    model, ids = accelerate(build(family)), tokens(2, 40)
    whole = logits(model, ids)
    cache = transformers.DynamicCache(config=model.config)
    parts = [logits(model, part, past_key_values=cache) for part in ids.split([17, 2, 1, 20], dim=1)]
    assert change(whole, torch.cat(parts, dim=1)) <= BOUND


LENGTHS = [7, 1, 2, 0, 70]


def packed(lengths: list[int]) -> dict[str, torch.Tensor]:
    """The keyword arguments that tell a model which tokens of a row belong together."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "position_ids": positions}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_equal_separate_ones(family: str) -> None:
    model, ids = build(family), tokens(1, sum(LENGTHS))
    arguments = packed(LENGTHS) | {"use_cache": False}
    separate = torch.cat([logits(model, part) for part in ids.split(LENGTHS, dim=1) if part.numel()], dim=1)
    leaking = logits(model, ids, **arguments)
    accelerate(model)
    assert change(separate, logits(model, ids, **arguments)) <= BOUND
    assert change(separate, leaking) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_holds_the_last_packed_sequence(family: str) -> None:
    layer, config = accelerate(build_layer(family)), build(family, kinds=KINDS[:1]).config
    together, alone = (transformers.DynamicCache(config=config) for _ in range(2))
    with torch.no_grad():
        result = layer(hidden(1, 80), together, cu_seq_lens_q=packed(LENGTHS)["cu_seq_lens_q"])
        wanted = layer(hidden(1, 80)[:, -70:], alone)
    assert change(wanted, result[:, -70:]) <= BOUND
    assert all(change(a, b) <= BOUND for a, b in zip(states(alone), states(together), strict=True))


def test_nothing_passes_from_one_packed_sequence_to_another() -> None:
    layer = accelerate(build_layer())
    x, boundaries = hidden(1, sum(LENGTHS)), packed(LENGTHS)["cu_seq_lens_q"]
    poisoned = x.clone()
    poisoned[:, 7] = float("nan")  # the second sequence
    with torch.no_grad():
        clean, result = layer(x, cu_seq_lens_q=boundaries), layer(poisoned, cu_seq_lens_q=boundaries)
    assert result[:, 7].isnan().all()
    rest = torch.arange(80) != 7
    assert torch.equal(clean[:, rest], result[:, rest])


def as_module(func: Any) -> Any:
    """A function as the `kernels` package wraps it."""

    class Func(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return func(*args, **kwargs)

    return Func()


@pytest.mark.parametrize(
    ("kind", "wrapped"),
    [("fallback", False), ("fallback", True), ("package", False), ("package", True), ("kernelized", True)],
)
def test_a_kernel_gets_the_boundaries_and_no_l2norm(monkeypatch: pytest.MonkeyPatch, kind: str, wrapped: bool) -> None:
    layer, boundaries = accelerate(build_layer()), packed([5, 4])["cu_seq_lens_q"]
    applicable_params = ("use_qk_l2norm_in_kernel", *(["cu_seqlens"] if kind == "package" else []))
    seen: list[Any] = []

    def kernel(query: Any, key: Any, value: Any, **kwargs: Any) -> Any:
        seen.append((kwargs["use_qk_l2norm_in_kernel"], kwargs.get("cu_seqlens")))
        return value, None

    def rule(*args: Any, **kwargs: Any) -> Any:
        """As Transformers wraps what it found, by these names."""
        return kernel(*args, **{name: value for name, value in kwargs.items() if name in applicable_params})

    found: Any = as_module(rule) if wrapped else rule
    if kind == "kernelized":
        found.forward = MethodType(lambda self, *args, **kwargs: kernel(*args, **kwargs), found)
    monkeypatch.setattr(f"{MODELING}.torch_chunk_gated_delta_rule", found)
    with torch.no_grad():
        layer(hidden(1, 9), cu_seq_lens_q=boundaries)
    assert seen == ([(False, None)] * 2 if kind == "fallback" else [(False, boundaries)])


def test_single_tokens_after_a_state_take_the_recurrent_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    config, layer = build(kinds=KINDS[:1]).config, accelerate(build_layer())
    seen: list[str] = []
    for name in ("chunk", "recurrent"):
        rule = getattr(sys.modules[MODELING], f"torch_{name}_gated_delta_rule")
        monkeypatch.setattr(f"{MODELING}.torch_{name}_gated_delta_rule", spy(seen, name, rule))
    cache = transformers.DynamicCache(config=config)
    with torch.no_grad():
        for length in (1, 1, 2, 1):
            layer(hidden(2, length), cache)
    assert seen == ["chunk", "recurrent", "chunk", "recurrent"]


def test_packed_sequences_in_two_rows() -> None:
    layer = accelerate(build_layer())
    with torch.no_grad(), pytest.raises(polyfuse.SpecError) as error:
        layer(hidden(2, 9), cu_seq_lens_q=packed([9, 9])["cu_seq_lens_q"])
    assert str(error.value) == (
        "gated_delta_net: hidden_states: expected packed sequences (cu_seq_lens_q) in one row, got 2 rows"
    )


def test_packed_sequences_after_a_cached_state() -> None:
    model = accelerate(build(kinds=KINDS[:2]))
    cache = transformers.DynamicCache(config=model.config)
    logits(model, tokens(1, 9), past_key_values=cache)
    before = [state.clone() for state in states(cache)]
    with pytest.raises(polyfuse.SpecError) as error:
        logits(model, tokens(1, 5), past_key_values=cache, cu_seq_lens_q=packed([2, 3])["cu_seq_lens_q"])
    assert str(error.value) == (
        "gated_delta_net: cu_seq_lens_q: expected one sequence, as a cached state is continued, got 2 sequences"
    )
    assert all(torch.equal(a, b) for a, b in zip(before, states(cache), strict=True))
    one = logits(model, tokens(1, 5), past_key_values=copy.deepcopy(cache))
    alone = logits(model, tokens(1, 5), past_key_values=cache, cu_seq_lens_q=packed([5])["cu_seq_lens_q"])
    assert torch.equal(one, alone)


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
def test_a_layer_that_the_ops_do_not_cover_runs_as_before(alter: Any, calls: list[str]) -> None:
    layer = build_layer()
    alter(layer)
    with torch.no_grad():
        before = layer(hidden(2, 9))
        after = accelerate(layer)(hidden(2, 9))
    assert torch.equal(before, after)
    assert not calls


@pytest.mark.parametrize("case", ["grad", "autocast", "seq_idx", "record_past"])
def test_a_call_that_the_ops_do_not_cover_runs_as_before(case: str, calls: list[str]) -> None:
    layer, config = build_layer(), build(kinds=KINDS[:1]).config
    arguments: dict[str, Any] = {"seq_idx": torch.zeros(2, 9, dtype=torch.int32)} if case == "seq_idx" else {}
    results = []
    for module in (layer, accelerate(copy.deepcopy(layer))):
        if case == "record_past":
            arguments["cache_params"] = transformers.DynamicCache(config=config)
            arguments["cache_params"].layers[0].activate_past_recording()
        with torch.set_grad_enabled(case == "grad"), torch.autocast("cpu", torch.bfloat16, case == "autocast"):
            results.append(module(hidden(2, 9), **arguments))
    assert torch.equal(*results)
    assert results[1].requires_grad == (case == "grad")
    assert not calls


def test_gradients_are_transformers() -> None:
    layer = build_layer()
    accelerated = accelerate(copy.deepcopy(layer))
    for module in (layer, accelerated):
        module(hidden(2, 9)).square().sum().backward()
    pairs = zip(layer.named_parameters(), accelerated.named_parameters(), strict=True)
    assert all(a == b and torch.equal(p.grad, q.grad) for (a, p), (b, q) in pairs)


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
    assert all(torch.equal(a, b) for a, b in zip(stacked_weights(layer), given, strict=True))
    if family != "Qwen3Next":
        parts = [getattr(layer, f"in_proj_{name}").weight for name in ("qkv", "z", "b", "a")]
        assert torch.equal(torch.cat(parts), layer.polyfuse_in_proj)
        return
    x = hidden(1, 1)
    query, key, value, z, b, a = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x), layer.in_proj_ba(x))
    wanted = torch.cat([part.flatten() for part in (query, key, value, z, b, a)])
    torch.testing.assert_close(layer.polyfuse_in_proj @ x.flatten(), wanted, rtol=1e-5, atol=1e-5)


def write(layer: Any) -> None:
    with torch.no_grad():
        layer.in_proj_z.weight.mul_(2)


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
def test_weights_are_stacked_again_when_they_change(alter: Any, calls: list[str]) -> None:
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
    assert len(calls) == 6


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


def test_a_layer_that_is_offloaded_later_runs_as_before(calls: list[str]) -> None:
    layer = build_layer()
    with torch.no_grad():
        before = layer(hidden(2, 9))
        accelerate(layer)
        for name in ("qkv", "z", "b", "a"):
            projection = getattr(layer, f"in_proj_{name}")
            projection.forward = partial(nn.functional.linear, weight=projection.weight)
            projection.weight = nn.Parameter(projection.weight.to("meta"))
        assert torch.equal(before, layer(hidden(2, 9)))
    assert not calls
