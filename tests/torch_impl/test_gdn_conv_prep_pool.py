"""`gdn_conv_prep` in plain PyTorch with a pool of states: written in place, and only where a sequence owns a slot."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from polyfuse.torch_impl.gdn_conv_prep import gdn_conv_prep
from tests.conv_pools import LENGTHS, SLOTS, any_bits, arguments, bits, in_parts

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [3, 4, 7])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pool_is_an_initial_and_a_final_state(dtype: str, columns: int, device: str) -> None:
    args = arguments(columns, dtype, device)
    pool, none = args["state_pool"].clone(), dict.fromkeys(("state_pool", "state_indices", "has_initial_state"))
    state = pool[SLOTS, :, columns - 3 :]
    state[[2, 4]] = 0
    given = {"initial_state": state, "output_final_state": True}
    *wanted, last = gdn_conv_prep(**args | none | given)
    *results, nothing = gdn_conv_prep(**args)
    assert nothing.shape == (0, 96, 3)
    for result, want in zip(results, wanted, strict=True):
        assert bits(result) == bits(want)
    for i, slot in enumerate(SLOTS):
        if slot >= 0:
            assert bits(args["state_pool"][slot, :, -3:]) == bits(last[i])
            # What was there moves as far as the sequence is long.
            old = torch.zeros_like(pool[slot]) if i == 4 else pool[slot]
            kept = max(columns - LENGTHS[i], 0)
            assert bits(args["state_pool"][slot, :, :kept]) == bits(old[:, columns - kept :])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("indices", [SLOTS, [-1] * 5, [7, -1, 9, 0, -3]])
def test_other_slots_keep_every_bit(indices: list[int], dtype: str, device: str) -> None:
    args = arguments(dtype=dtype, device=device)
    pool = any_bits(args["state_pool"])
    before = pool.clone()
    gdn_conv_prep(**args | {"state_pool": pool, "state_indices": torch.tensor(indices, device=device)})
    others = [slot for slot in range(7) if slot not in indices]
    assert bits(pool[others]) == bits(before[others])
    owned = [slot for slot in indices if 0 <= slot < 7]
    assert (bits(pool) == bits(before)) is (not owned)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 0, 2)])
def test_a_pool_is_written_where_it_lies(order: tuple[int, ...]) -> None:
    """A view of every second slot of a larger buffer, whose dimensions lie in any order."""
    args = arguments()
    wanted = gdn_conv_prep(**args)
    pool = arguments()["state_pool"]
    wide = torch.full((14, 96, 5), torch.nan).permute(order).contiguous().permute([order.index(i) for i in range(3)])
    wide[1::2] = pool
    results = gdn_conv_prep(**args | {"state_pool": wide[1::2]})
    for result, want in zip(results, wanted, strict=True):
        assert bits(result) == bits(want)
    assert bits(wide[1::2]) == bits(args["state_pool"])
    assert wide[::2].isnan().all()


@pytest.mark.parametrize("columns", [3, 5])
@pytest.mark.parametrize("ends", [[20], [1, 2, 3, 20], [0, 4, 4, 18, 19, 20]])
def test_a_sequence_in_parts_is_the_sequence(ends: list[int], columns: int) -> None:
    whole = arguments(columns)
    none = dict.fromkeys(("state_pool", "state_indices", "has_initial_state", "cu_seqlens"))
    *wanted, last = gdn_conv_prep(**whole | none | {"output_final_state": True})
    for result, want in zip(in_parts(gdn_conv_prep, whole, ends), wanted, strict=True):
        assert bits(result) == bits(want)
    assert bits(whole["state_pool"][2, :, -3:].bfloat16()) == bits(last[0])


def test_without_indices_the_first_slots_are_taken() -> None:
    named, args = arguments(state_indices=torch.arange(5)), arguments(state_indices=None)
    for result, want in zip(gdn_conv_prep(**args), gdn_conv_prep(**named), strict=True):
        assert bits(result) == bits(want)
    assert bits(args["state_pool"]) == bits(named["state_pool"])


def test_nothing_is_read_back_to_the_host() -> None:
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        args: dict[str, Any] = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments().items()
        }
        assert [tuple(result.shape) for result in gdn_conv_prep(**args)][5] == (0, 96, 3)
