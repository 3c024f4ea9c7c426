"""The states of accelerated Gated DeltaNet layers in Transformers' caches, whatever is done to these between calls."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import polyfuse
from polyfuse.integrations.transformers import accelerate, restore
from tests.integrations.transformers.gated_delta_net_models import (
    BOUND,
    DECODE,
    FAMILIES,
    PREFILL,
    build,
    change,
    in_parts,
    logits,
    states,
    tokens,
)

CACHES = ("DynamicCache", "StaticCache")
PADDING = (0, 4, 7)  # of three prompts, on the left


def empty(kind: str, model: Any) -> Any:
    sizes = {"max_cache_len": 96} if kind == "StaticCache" else {}
    return getattr(transformers, kind)(config=model.config, **sizes)


def answers(model: Any, ids: torch.Tensor, prompt: int, cache: Any) -> torch.Tensor:
    """The logits of prompts that are padded on the left by `PADDING`, and of single tokens after them."""
    mask = torch.arange(ids.shape[1]) >= torch.tensor(PADDING)[:, None]
    ends = [0, prompt, *range(prompt + 1, ids.shape[1] + 1)]
    parts = [
        logits(model, ids[:, begin:end], attention_mask=mask[:, :end].long(), past_key_values=cache)
        for begin, end in pairwise(ends)
    ]
    return torch.cat(parts, dim=1)


def assert_same_states(old: Any, new: Any, bound: float) -> None:
    for a, b in zip(states(old), states(new), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert change(a, b) <= bound


@pytest.mark.parametrize("piece", [1, 3, 64, 70])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_pieces_is_the_prompt(family: str, kind: str, piece: int, op_calls: list[str]) -> None:
    model, ids = build(family), tokens(2, 73)
    whole, old = logits(model, ids), empty(kind, model)
    in_parts(model, ids, [73], old)
    accelerate(model)
    new = empty(kind, model)
    lengths = [piece] * (73 // piece) + [73 % piece] * (73 % piece > 0)
    assert change(whole, in_parts(model, ids, lengths, new)) <= BOUND
    assert_same_states(old, new, BOUND)
    wanted = [PREFILL if n > 1 or i == 0 else DECODE for i, n in enumerate(lengths)]
    assert op_calls == [name for ops in wanted for name in ops * 2]


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_prompts_and_a_cache_that_is_reset(family: str, kind: str) -> None:
    """Three times over the same buffers, of which the last one must not see what the others left behind."""
    model = build(family)
    old, new = empty(kind, model), empty(kind, model)
    twin, where = accelerate(copy.deepcopy(model)), []
    for seed in (0, 5, 0):
        before, after = (answers(each, tokens(3, 17, seed), 9, cache) for each, cache in ((model, old), (twin, new)))
        assert change(before, after) <= BOUND
        assert_same_states(old, new, BOUND)
        where.append([state.data_ptr() for state in states(new)])
        for cache in (old, new):
            cache.reset()
        assert not any(state.any() for state in states(new))
    assert where[0] == where[1] == where[2]


@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_shorter_than_the_conv(family: str, length: int) -> None:
    model, ids = build(family), tokens(2, length + 6)
    old, new = (empty("DynamicCache", model) for _ in range(2))
    lengths = [length, *[1] * 6]
    before = in_parts(model, ids, lengths, old)
    assert change(before, in_parts(accelerate(model), ids, lengths, new)) <= BOUND
    assert_same_states(old, new, BOUND)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reordered_cache_belongs_to_the_reordered_prompts(family: str, kind: str) -> None:
    model, ids, order = accelerate(build(family)), tokens(3, 12), torch.tensor([2, 0, 0])
    cache, wanted = (empty(kind, model) for _ in range(2))
    in_parts(model, ids[:, :9], [8, 1], cache)
    cache.reorder_cache(order)
    in_parts(model, ids[order, :9], [8, 1], wanted)
    results = [in_parts(model, ids[order, 9:], [1, 2], each) for each in (wanted, cache)]
    assert change(*results) <= BOUND
    assert_same_states(wanted, cache, BOUND)


@pytest.mark.parametrize("kind", CACHES)
def test_a_copied_cache_is_independent(kind: str) -> None:
    model, ids = accelerate(build()), tokens(2, 12)
    cache = empty(kind, model)
    in_parts(model, ids[:, :9], [8, 1], cache)
    twin, before = copy.deepcopy(cache), copy.deepcopy(cache)
    first = in_parts(model, ids[:, 9:], [1, 2], twin)
    assert_same_states(before, cache, 0)
    assert torch.equal(first, in_parts(model, ids[:, 9:], [1, 2], cache))
    assert_same_states(twin, cache, 0)
    assert all(change(a, b) > BOUND for a, b in zip(states(before), states(cache), strict=True))


@pytest.mark.parametrize("first", ["untouched", "accelerated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_states_pass_between_the_untouched_and_the_accelerated_model(
    family: str, dtype: torch.dtype, first: str
) -> None:
    """After prefill and decode the other one goes on, with several tokens and with single ones, and then the first."""
    model, ids, lengths = build(family, dtype), tokens(2, 40), [9, 1, 1, 9, 1, 1, 16, 1, 1]
    exact = in_parts(copy.deepcopy(model).float(), ids, lengths)
    old, new = (empty("DynamicCache", model) for _ in range(2))
    before = in_parts(model, ids, lengths, old)
    turns, parts = [accelerate, restore], []
    if first == "accelerated":
        accelerate(model)
        turns.reverse()
    for begin, end, part in ((0, 11, [9, 1, 1]), (11, 22, [9, 1, 1]), (22, 40, [16, 1, 1])):
        parts.append(in_parts(model, ids[:, begin:end], part, new))
        turns[0](model)
        turns.reverse()
    after = torch.cat(parts, dim=1)
    assert not torch.equal(before, after)
    assert [state.dtype for state in states(new)] == [dtype, torch.float32] * 2
    if dtype == torch.float32:
        assert change(before, after) <= BOUND
        assert_same_states(old, new, BOUND)
    else:
        # Two independent roundings differ by no more than both errors together.
        assert (after - exact).norm() <= 2 * (before - exact).norm()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_cache_of_another_number_of_sequences(rows: int, length: int, reset: bool) -> None:
    model = accelerate(build())
    cache = empty("DynamicCache", model)
    logits(model, tokens(2, 9), past_key_values=cache)
    if reset:
        cache.reset()
    before = [state.clone() for state in states(cache)]
    with pytest.raises(polyfuse.SpecError) as error:
        logits(model, tokens(rows, length), past_key_values=cache)
    assert str(error.value) == f"gated_delta_net: hidden_states: expected 2 sequences, as the cache holds, got {rows}"
    assert all(torch.equal(a, b) for a, b in zip(before, states(cache), strict=True))


@pytest.mark.parametrize(
    "family", ["Qwen3_5", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "Qwen3_5")]
)
def test_256_greedy_tokens_are_identical(family: str, op_calls: list[str]) -> None:
    model, options = build(family), {"max_new_tokens": 256, "do_sample": False, "pad_token_id": 0}
    before = model.generate(tokens(3, 9), eos_token_id=None, **options)
    after = accelerate(model).generate(tokens(3, 9), eos_token_id=None, **options)
    assert before.shape == (3, 265)
    assert torch.equal(before, after)
    assert op_calls == PREFILL * 2 + DECODE * 2 * 255
