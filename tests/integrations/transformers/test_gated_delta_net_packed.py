"""Packed sequences in Gated DeltaNet layers, and which of the model's delta rules gets what."""

import copy
import sys
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

import polyfuse
from polyfuse.integrations.transformers import accelerate
from tests.integrations.transformers.gated_delta_net_models import (
    BOUND,
    FAMILIES,
    KINDS,
    MODELING,
    build,
    build_layer,
    change,
    hidden,
    logits,
    spy,
    states,
    tokens,
)

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
    if transformers.__version__ < "5.24":
        assert change(separate, logits(model, ids, **arguments)) > 0.01  # state passes from one to the next
    else:
        with pytest.raises(ValueError, match="can't keep packed sequences apart"):
            logits(model, ids, **arguments)
    accelerate(model)
    assert change(separate, logits(model, ids, **arguments)) <= BOUND


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
