"""`gated_delta_rule` in plain PyTorch with a pool: written in place, and only where a sequence owns a slot."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from polyfuse.torch_impl.gated_delta_rule import gated_delta_rule
from tests.conv_pools import any_bits, bits
from tests.rule_pools import NO_POOL, ROWS, SLOTS, arguments, found, in_parts

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_pool_is_an_initial_and_a_final_state(dtype: str, device: str) -> None:
    args = arguments(dtype, device)
    wanted, last = gated_delta_rule(**args | NO_POOL | {"initial_state": found(args), "output_final_state": True})
    o, nothing = gated_delta_rule(**args)
    assert nothing.shape == (0, 2, 16, 8)
    assert bits(o) == bits(wanted)
    for i, slot in enumerate(SLOTS):
        if slot >= 0:
            assert bits(args["state_pool"][slot]) == bits(last[i].to(args["state_pool"].dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("indices", [SLOTS, [-1] * 5, [7, -1, 2**40, 0, -3]])
def test_other_slots_keep_every_bit(indices: list[int], dtype: str, device: str) -> None:
    args = arguments(dtype, device)
    pool = any_bits(args["state_pool"])
    before = pool.clone()
    gated_delta_rule(**args | {"state_pool": pool, "state_indices": torch.tensor(indices, device=device)})
    others = [slot for slot in range(7) if slot not in indices]
    assert bits(pool[others]) == bits(before[others])
    owned = [slot for slot in indices if 0 <= slot < 7]
    assert (bits(pool) == bits(before)) is (not owned)


@pytest.mark.parametrize("rows", [84, 0])
def test_an_empty_sequence_keeps_its_slot_or_clears_it(rows: int) -> None:
    valid = torch.tensor([True, False, True, False, True])
    args = arguments(rows=rows, cu_seqlens=torch.zeros(6, dtype=torch.int32), has_initial_state=valid)
    before = args["state_pool"].clone()
    o, _ = gated_delta_rule(**args)
    assert o.shape == (rows, 2, 8)
    assert not o.any()
    before[[6, 1]] = 0
    assert bits(args["state_pool"]) == bits(before)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 1, 3, 2), (3, 2, 1, 0), (1, 0, 3, 2)])
def test_a_pool_is_written_where_it_lies(order: tuple[int, ...]) -> None:
    """A view of every second slot of a larger buffer, whose dimensions lie in any order."""
    args = arguments()
    wanted, _ = gated_delta_rule(**args)
    wide = torch.full((14, 2, 16, 8), torch.nan).permute(order).contiguous().permute([order.index(i) for i in range(4)])
    wide[1::2] = arguments()["state_pool"]
    o, _ = gated_delta_rule(**args | {"state_pool": wide[1::2]})
    assert bits(o) == bits(wanted)
    assert bits(wide[1::2]) == bits(args["state_pool"])
    assert wide[::2].isnan().all()


@pytest.mark.parametrize("ends", [[64, 200], [64, 128, 192, 200], [0, 128, 128, 200]])
def test_a_sequence_in_parts_of_whole_chunks_is_the_sequence(ends: list[int]) -> None:
    whole = arguments(rows=200)
    alone = {name: whole[name] for name in ROWS}
    wanted, last = gated_delta_rule(**alone, output_final_state=True)
    assert bits(in_parts(gated_delta_rule, whole, ends)) == bits(wanted)
    assert bits(whole["state_pool"][2]) == bits(last[0])


def test_without_indices_the_first_slots_are_taken() -> None:
    named, args = arguments(state_indices=torch.arange(5)), arguments(state_indices=None)
    assert bits(gated_delta_rule(**args)[0]) == bits(gated_delta_rule(**named)[0])
    assert bits(args["state_pool"]) == bits(named["state_pool"])


def test_nothing_is_read_back_to_the_host() -> None:
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        args: dict[str, Any] = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments().items()
        }
        assert [tuple(result.shape) for result in gated_delta_rule(**args)] == [(84, 2, 8), (0, 2, 16, 8)]
