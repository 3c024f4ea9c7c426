"""Packed sequences in Gated DeltaNet layers, with a state for each in the cache."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import polyfuse
from polyfuse.integrations.transformers import accelerate
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
    logits,
    states,
    tokens,
)

LENGTHS = [7, 1, 2, 0, 70]


def packed(lengths: list[int]) -> dict[str, torch.Tensor]:
    """The keyword arguments that tell a model which tokens of a row belong together."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "position_ids": positions}


def empty_cache(family: str) -> Any:
    return transformers.DynamicCache(config=build(family, kinds=KINDS[:1]).config)


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
def test_each_packed_sequence_has_a_state_that_later_calls_continue(family: str, op_calls: list[str]) -> None:
    """Packed, then packed with other lengths, then a token of each in rows, packed, and in rows: as each one alone."""
    layer = accelerate(build_layer(family))
    calls = [LENGTHS, [1, 0, 70, 3, 2], [1] * 5, [1] * 5, [1] * 5]
    x = [hidden(1, sum(lengths), seed=seed) for seed, lengths in enumerate(calls)]
    cache, together = empty_cache(family), []
    with torch.no_grad():
        for step, (rows, lengths) in enumerate(zip(x, calls, strict=True)):
            if step in (2, 4):
                together.append(layer(rows.transpose(0, 1), cache).transpose(0, 1))
            else:
                together.append(layer(rows, cache, cu_seq_lens_q=packed(lengths)["cu_seq_lens_q"]))
    assert op_calls == PREFILL * 2 + DECODE + PREFILL + DECODE
    for number in range(5):
        alone = empty_cache(family)
        for rows, lengths, result in zip(x, calls, together, strict=True):
            own, got = (part.split(lengths, dim=1)[number] for part in (rows, result))
            if own.numel():
                with torch.no_grad():
                    assert change(layer(own, alone), got) <= BOUND
        for wanted, held in zip(states(alone), states(cache), strict=True):
            assert change(wanted[0], held[number]) <= BOUND


def test_a_packed_sequence_that_ends_empty_leaves_zeros_and_keeps_states() -> None:
    layer, cache = accelerate(build_layer()), empty_cache("Qwen3_5")
    with torch.no_grad():
        layer(hidden(1, 9), cache, cu_seq_lens_q=packed([4, 0, 5])["cu_seq_lens_q"])
        first = [state.clone() for state in states(cache)]
        assert all(not state[1].any() and state[0].any() and state[2].any() for state in first)
        layer(hidden(1, 9), cache, cu_seq_lens_q=packed([0, 9, 0])["cu_seq_lens_q"])
    for before, after in zip(first, states(cache), strict=True):
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[2], after[2])
        assert after[1].any()


def test_nothing_passes_from_one_packed_sequence_to_another() -> None:
    layer = accelerate(build_layer())
    x, boundaries = hidden(1, sum(LENGTHS)), packed(LENGTHS)["cu_seq_lens_q"]
    poisoned = x.clone()
    poisoned[:, 7] = float("nan")  # the second sequence
    clean, dirty = empty_cache("Qwen3_5"), empty_cache("Qwen3_5")
    with torch.no_grad():
        before, after = layer(x, clean, cu_seq_lens_q=boundaries), layer(poisoned, dirty, cu_seq_lens_q=boundaries)
    assert after[:, 7].isnan().all()
    rest = torch.arange(80) != 7
    assert torch.equal(before[:, rest], after[:, rest])
    others = torch.arange(5) != 1
    for old, new in zip(states(clean), states(dirty), strict=True):
        assert new[1].isnan().any()
        assert torch.equal(old[others], new[others])


def test_packed_sequences_in_two_rows() -> None:
    layer = accelerate(build_layer())
    with torch.no_grad(), pytest.raises(polyfuse.SpecError) as error:
        layer(hidden(2, 9), cu_seq_lens_q=packed([9, 9])["cu_seq_lens_q"])
    assert str(error.value) == (
        "gated_delta_net: hidden_states: expected packed sequences (cu_seq_lens_q) in one row, got 2 rows"
    )


def test_packed_sequences_of_another_number_than_the_cache_holds() -> None:
    model = accelerate(build(kinds=KINDS[:2]))
    cache = transformers.DynamicCache(config=model.config)
    logits(model, tokens(1, 9), past_key_values=cache)
    before = [state.clone() for state in states(cache)]
    with pytest.raises(polyfuse.SpecError) as error:
        logits(model, tokens(1, 5), past_key_values=cache, cu_seq_lens_q=packed([2, 3])["cu_seq_lens_q"])
    assert str(error.value) == "gated_delta_net: hidden_states: expected 1 sequences, as the cache holds, got 2"
    assert all(torch.equal(a, b) for a, b in zip(before, states(cache), strict=True))
