"""The pool of `gdn_conv_prep` in the Triton backend: read by the kernel that computes, written by the one after it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from polyfuse.triton_impl import _conv_state
from polyfuse.triton_impl import gdn_conv_prep as module
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl.gdn_conv_prep import gdn_conv_prep
from tests.conv_pools import SLOTS, any_bits, arguments, bits, in_parts
from tests.triton_impl.helpers import DEVICE, RecordingKernel

# NumPy's, from the interpreter: arithmetic on random bits.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("strips", [1, 512])
@pytest.mark.parametrize("columns", [3, 6])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("forget_plans")
def test_a_pool_is_an_initial_and_a_final_state(
    dtype: str, columns: int, strips: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STRIPS", strips)
    args = arguments(columns, dtype, DEVICE)
    none = dict.fromkeys(("state_pool", "state_indices", "has_initial_state"))
    state = args["state_pool"][SLOTS, :, columns - 3 :]
    state[[2, 4]] = 0
    *wanted, last = gdn_conv_prep(**args | none | {"initial_state": state, "output_final_state": True})
    *results, nothing = gdn_conv_prep(**args)
    assert nothing.shape == (0, 96, 3)
    for result, want in zip(results, wanted, strict=True):
        assert bits(result) == bits(want)
    for i, slot in enumerate(SLOTS):
        if slot >= 0:
            assert bits(args["state_pool"][slot, :, -3:]) == bits(last[i])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("indices", [SLOTS, [-1] * 5, [7, -1, 9, 0, -3]])
def test_other_slots_keep_every_bit(indices: list[int], dtype: str) -> None:
    args = arguments(dtype=dtype, device=DEVICE)
    pool = any_bits(args["state_pool"])
    before = pool.clone()
    gdn_conv_prep(**args | {"state_pool": pool, "state_indices": torch.tensor(indices, device=DEVICE)})
    others = [slot for slot in range(7) if slot not in indices]
    assert bits(pool[others]) == bits(before[others])
    owned = [slot for slot in indices if 0 <= slot < 7]
    assert (bits(pool) == bits(before)) is (not owned)


@pytest.mark.parametrize("columns", [3, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ends", [[20], [1, 2, 3, 20], [0, 4, 4, 18, 19, 20]])
def test_a_sequence_in_parts_is_the_sequence(ends: list[int], columns: int) -> None:
    whole = arguments(columns, device=DEVICE)
    none = dict.fromkeys(("state_pool", "state_indices", "has_initial_state", "cu_seqlens"))
    *wanted, last = gdn_conv_prep(**whole | none | {"output_final_state": True})
    for result, want in zip(in_parts(gdn_conv_prep, whole, ends), wanted, strict=True):
        assert bits(result) == bits(want)
    assert bits(whole["state_pool"][2, :, -3:].bfloat16()) == bits(last[0])


@pytest.mark.parametrize("rows", [20, 0])
def test_a_pool_is_read_and_written_where_it_lies(rows: int, passed: list[tuple[Any, ...]]) -> None:
    """[slots, n, C] in memory, every second slot of a larger buffer: no copy, and one launch more."""
    args = arguments(device=DEVICE)
    args |= {name: args[name][:rows] for name in ("x", "a", "b")}
    args["cu_seqlens"] = args["cu_seqlens"].clamp(max=rows)
    wide = torch.full((14, 5, 96), torch.nan, device=DEVICE).transpose(1, 2)
    wide[1::2] = args["state_pool"]
    gdn_conv_prep(**args)
    del passed[:]
    gdn_conv_prep(**args | {"state_pool": wide[1::2]})
    read = [passed[0][7].data_ptr()] if rows else []
    assert read == [wide[1::2][:, :, 2:].data_ptr()] * len(read)
    assert [arguments[1].data_ptr() for arguments in passed[len(read) :]] == [wide[1::2].data_ptr()]
    assert bits(wide[1::2]) == bits(args["state_pool"])
    assert wide[::2].isnan().all()


def test_a_wide_pool_has_several_programs_a_sequence(
    forget_plans: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = arguments(device=DEVICE)
    gdn_conv_prep(**wanted)
    forget_plans()
    kernel = RecordingKernel(_conv_state._update.kernel)
    monkeypatch.setattr(_conv_state, "_update", Launcher("gdn_conv_prep", kernel))
    monkeypatch.setattr(_conv_state, "TILE", 8 * 16)  # 16 of the 96 channels, 5 columns as 8
    args = arguments(device=DEVICE)
    gdn_conv_prep(**args)
    assert kernel.grids == [(5 * 6, 1, 1)]
    assert bits(args["state_pool"]) == bits(wanted["state_pool"])


COMPILE = """
import re
from tests.triton_impl.hopper import compile_for_hopper
from polyfuse.triton_impl._conv_state import _update_pool

for dtype, rows, key_head in (("*bf16", True, 0), ("*fp32", True, 768), ("*fp32", False, 0)):
    types = {n: "*bf16" if n.endswith("_ptr") else "i32" for n in _update_pool.arg_names}
    types |= {"pool_ptr": dtype, "slots_ptr": "*i32", "valid_ptr": "*u8", "cu_ptr": "*i32"}
    constants = dict(KEY_HEAD=key_head, H=16, K=128, VALUES=256, C=8192, COLUMNS=4, CHANNELS=512)
    constants |= dict(pool_channel=1) if rows else dict(pool_column=1)
    aligned = [n for n in types if n.endswith(("_ptr", "x_row", "_slot", "_column")) and n not in constants]
    code, spilled = compile_for_hopper(_update_pool, types, constants, aligned, warps=4)
    found = {n: [m.start() for m in re.finditer(n, code)] for n in ("bar.sync", "ld.global", "st.global")}
    last, first = max(found["ld.global"]), min(found["st.global"])
    wide = set(re.findall(r"st\\.global\\S*?\\.(v4\\.b32|\\w+) ", code))
    print(any(last < barrier < first for barrier in found["bar.sync"]), *wide, spilled)
"""


@pytest.mark.slow
def test_on_hopper_all_is_read_before_the_first_store(run_uninterpreted: Callable[[str], list[str]]) -> None:
    """Threads wait for one another in between; 16 bytes a store where channels lie side by side, and nothing spills."""
    assert run_uninterpreted(COMPILE) == ["True v4.b32 []", "True v4.b32 []", "True b32 []"]
