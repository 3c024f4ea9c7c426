"""The pool of `gated_delta_rule` in the Triton backend: each state is read and written by the same program."""

from typing import Any

import pytest
import torch

from polyfuse.triton_impl.gated_delta_rule import gated_delta_rule
from tests.conv_pools import any_bits, bits
from tests.rule_pools import NO_POOL, ROWS, SLOTS, arguments, found, in_parts
from tests.triton_impl.helpers import DEVICE

# NumPy's, from the interpreter: arithmetic on random bits.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_pool_is_an_initial_and_a_final_state(dtype: str, poisoned_memory: None) -> None:
    args = arguments(dtype, DEVICE)
    wanted, last = gated_delta_rule(**args | NO_POOL | {"initial_state": found(args), "output_final_state": True})
    o, nothing = gated_delta_rule(**args)
    assert nothing.shape == (0, 2, 16, 8)
    assert bits(o) == bits(wanted)
    for i, slot in enumerate(SLOTS):
        if slot >= 0:
            assert bits(args["state_pool"][slot]) == bits(last[i].to(args["state_pool"].dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("indices", [SLOTS, [-1] * 5, [7, -1, 2**40, 0, -3]])
def test_other_slots_keep_every_bit(indices: list[int], dtype: str) -> None:
    args = arguments(dtype, DEVICE)
    pool = any_bits(args["state_pool"])
    before = pool.clone()
    gated_delta_rule(**args | {"state_pool": pool, "state_indices": torch.tensor(indices, device=DEVICE)})
    others = [slot for slot in range(7) if slot not in indices]
    assert bits(pool[others]) == bits(before[others])
    owned = [slot for slot in indices if 0 <= slot < 7]
    assert (bits(pool) == bits(before)) is (not owned)


@pytest.mark.parametrize("rows", [84, 0])
def test_an_empty_sequence_keeps_its_slot_or_clears_it(rows: int, poisoned_memory: None) -> None:
    valid = torch.tensor([True, False, True, False, True], device=DEVICE)
    ends = torch.zeros(6, dtype=torch.int32, device=DEVICE)
    args = arguments(device=DEVICE, rows=rows, cu_seqlens=ends, has_initial_state=valid)
    before = args["state_pool"].clone()
    o, _ = gated_delta_rule(**args)
    assert o.shape == (rows, 2, 8)
    assert not o.any()
    before[[6, 1]] = 0
    assert bits(args["state_pool"]) == bits(before)


@pytest.mark.parametrize("ends", [[64, 200], [64, 128, 192, 200], [0, 128, 128, 200]])
def test_a_sequence_in_parts_of_whole_chunks_is_the_sequence(ends: list[int]) -> None:
    whole = arguments(device=DEVICE, rows=200)
    alone = {name: whole[name] for name in ROWS}
    wanted, last = gated_delta_rule(**alone, output_final_state=True)
    assert bits(in_parts(gated_delta_rule, whole, ends)) == bits(wanted)
    assert bits(whole["state_pool"][2]) == bits(last[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pool_is_read_and_written_where_it_lies(dtype: str, passed: list[tuple[Any, ...]]) -> None:
    """V before K in memory, every second slot of a larger buffer: no copy."""
    args = arguments(dtype, DEVICE)
    before = args["state_pool"].clone()
    o, _ = gated_delta_rule(**args)
    wide = torch.full((14, 2, 8, 16), torch.nan, device=DEVICE, dtype=before.dtype).transpose(2, 3)
    wide[1::2] = before
    assert bits(gated_delta_rule(**args | {"state_pool": wide[1::2]})[0]) == bits(o)
    assert [passed[-1][place].data_ptr() for place in (4, 11)] == [wide[1::2].data_ptr()] * 2
    assert bits(wide[1::2]) == bits(args["state_pool"])
    assert wide[::2].isnan().all()
