from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyfuse.conformance import Case, Trial, cases
from polyfuse.conformance.inputs import make_inputs
from polyfuse.dispatch import from_numpy, registry, to_numpy
from polyfuse.spec import OPS
from polyfuse.triton_impl import gdn_conv_prep as module
from polyfuse.triton_impl._common import INTERPRETED
from polyfuse.triton_impl.gdn_conv_prep import gdn_conv_prep
from tests import interleaved

OP = "gdn_conv_prep"
DEVICE = "cpu" if INTERPRETED.value else "cuda"
HEADS = {"num_k_heads": 2, "head_k_dim": 16, "head_v_dim": 8}
ENDS = [0, 9, 9, 11, 30, 31, 44]
SLOW = ("many_sequences", "long_sequences", "rows_67", "width_2-", "width_3-plain", "width_3-bias-i", "width_3-initial")
CASES = [case for case in cases(OP) if case.repeat == 1 and not case.name.startswith(SLOW)]
# The interpreter takes a second for each.
QUICK = [pytest.param(case, marks=[pytest.mark.slow] if n % 8 else []) for n, case in enumerate(CASES)]

# NumPy's, from the interpreter: 0 * inf in a head that holds an infinity.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def arguments(**changed: Any) -> dict[str, Any]:
    """Six packed sequences of 44 rows, one of them empty, with initial states."""
    dims = {"L": 44, "HV": 4, "W": 4, "N": 7, "S": 6}
    case = Case(
        "packed",
        dims,
        HEADS | {"output_final_state": True},
        {"T": "bfloat16", "initial_state": "bfloat16"},
        present=("initial_state", "bias"),
    )
    values = make_inputs(OPS[OP], case)
    arrays = {k: from_numpy(v, "torch", DEVICE) for k, v in values.items() if isinstance(v, np.ndarray)}
    return {**values, **arrays, "cu_seqlens": torch.tensor(ENDS, device=DEVICE), **changed}


def bits(x: torch.Tensor) -> bytes:
    return to_numpy(x).tobytes()


def same(results: Any, wanted: Any) -> list[bool]:
    return [bits(result) == bits(want) for result, want in zip(results, wanted, strict=True)]


def of_sequence(args: dict[str, Any], i: int, rows: slice) -> dict[str, Any]:
    """The arguments of one sequence alone, of some of its rows."""
    mine: dict[str, Any] = {name: args[name][ENDS[i] : ENDS[i + 1]][rows] for name in ("x", "a", "b")}
    return {**args, **mine, "cu_seqlens": None, "initial_state": args["initial_state"][i : i + 1]}


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_cases(case: Case) -> None:
    assert Trial(OP, case, 0).on(registry().get("triton"), DEVICE) == ("passed", "")


@pytest.mark.parametrize("strips", [1, 5, 512])
@pytest.mark.usefixtures("forget_plans")
def test_packed_sequences_are_separate_ones(strips: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits from strips of 44, 8 and 4 rows, whose ends are not those of sequences, and from each alone."""
    monkeypatch.setattr(module, "STRIPS", strips)
    args = arguments()
    together = gdn_conv_prep(**args)
    for i in (0, 3, 4):
        alone = gdn_conv_prep(**of_sequence(args, i, slice(None)))
        part = [*(r[ENDS[i] : ENDS[i + 1]] for r in together[:5]), together[5][i : i + 1]]
        assert all(same(alone, part)), i
    assert bits(together[5][1]) == bits(args["initial_state"][1])


@pytest.mark.parametrize("cut", [1, 3])
def test_a_sequence_in_two_calls(cut: int) -> None:
    args = arguments()
    whole = gdn_conv_prep(**of_sequence(args, 3, slice(None)))
    first = gdn_conv_prep(**of_sequence(args, 3, slice(cut)))
    second = gdn_conv_prep(**of_sequence(args, 3, slice(cut, None)) | {"initial_state": first[5]})
    joined = [*(torch.cat([one, two]) for one, two in zip(first[:5], second[:5], strict=True)), second[5]]
    assert all(same(joined, whole))


def test_nan_stays_in_its_sequence() -> None:
    args = arguments()
    clean = gdn_conv_prep(**args)
    args["x"] = args["x"].clone()
    args["x"][11:30] = torch.nan
    dirty = gdn_conv_prep(**args)
    for rows in (slice(0, 11), slice(30, 44)):
        assert all(same([r[rows] for r in dirty[:5]], [r[rows] for r in clean[:5]]))
    assert dirty[2][11:30].isnan().all()
    assert all(same(dirty[5][[0, 1, 2, 4, 5]], clean[5][[0, 1, 2, 4, 5]]))


@pytest.mark.parametrize("dtype", [torch.int32, pytest.param(torch.int64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["x", "weight", "initial_state"])
def test_layouts_change_no_bit(name: str, dtype: torch.dtype) -> None:
    args = arguments(cu_seqlens=torch.tensor(ENDS, device=DEVICE, dtype=dtype))
    last = args[name].ndim - 1
    turned = args[name].transpose(last - 1, last).contiguous().transpose(last - 1, last)
    assert turned.stride() != args[name].stride()
    assert all(same(gdn_conv_prep(**args | {name: turned}), gdn_conv_prep(**args)))


@pytest.mark.parametrize("case", interleaved.CASES[::8], ids=lambda case: case.name)
def test_interleaved_is_the_op_on_columns_in_order(case: Case, poisoned_memory: None) -> None:
    results = []
    for values in (given := make_inputs(OPS[OP], case), interleaved.in_order(given)):
        arrays = {k: from_numpy(v, "torch", DEVICE) for k, v in values.items() if isinstance(v, np.ndarray)}
        results.append(gdn_conv_prep(**{**values, **arrays}))
    assert all(same(*results))


def test_gates_are_read_where_they_lie(passed: list[tuple[Any, ...]]) -> None:
    """x, and a and b as views of one projection, reach the kernel as they are."""
    x, ba = torch.zeros(3, 2 * (2 * 16 + 2 * 2 * 8), device=DEVICE), torch.zeros(3, 2, 2 * 2, device=DEVICE)
    a, b, heads = ba[..., 2:], ba[..., :2], torch.zeros(4, device=DEVICE)
    gdn_conv_prep(x, torch.zeros(96, 4, device=DEVICE), a, b, heads, heads, **HEADS, interleaved=True)
    assert [passed[0][i].data_ptr() for i in (0, 2, 3)] == [x.data_ptr(), a.data_ptr(), b.data_ptr()]


@pytest.mark.parametrize("apart", [2**30, 2**31])
def test_offsets_past_2_31(apart: int, tmp_path: Path) -> None:
    """Rows of an interleaved x 2**31 and more elements from the first one, in a sparse file."""
    attrs = {"num_k_heads": 2, "head_k_dim": 2, "head_v_dim": 2, "interleaved": True, "output_final_state": True}
    values = make_inputs(OPS[OP], Case("far", {"L": 3, "HV": 2, "W": 4}, attrs, {"T": "bfloat16"}))
    arrays = {k: from_numpy(v, "torch", DEVICE) for k, v in values.items() if isinstance(v, np.ndarray)}
    args: dict[str, Any] = {**values, **arrays}
    size = 2 * apart + 16
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
    memory.as_strided((3, 16), (apart, 1)).copy_(args["x"])
    far: dict[str, Any] = {"x": memory.to(DEVICE).as_strided((3, 16), (apart, 1))}
    assert all(same(gdn_conv_prep(**args | far), gdn_conv_prep(**args)))


def test_rows_of_single_sequences_are_a_decode_step() -> None:
    """44 sequences of one row each: the launch that takes single rows."""
    args = arguments(cu_seqlens=torch.arange(45, device=DEVICE))
    state = args["initial_state"].repeat(8, 1, 1)[:44]
    together = gdn_conv_prep(**args | {"initial_state": state})
    assert module._tile(44, 44, 2, 16, 4, 8)[0] == 1
    for i in (0, 17, 43):
        one: dict[str, Any] = {key: args[key][i : i + 1] for key in ("x", "a", "b")}
        alone = gdn_conv_prep(**args | one | {"cu_seqlens": None, "initial_state": state[i : i + 1]})
        assert all(same(alone, [r[i : i + 1] for r in together]))


def test_no_rows() -> None:
    args = arguments(cu_seqlens=torch.zeros(7, dtype=torch.int32, device=DEVICE))
    none: dict[str, Any] = {name: args[name][:0] for name in ("x", "a", "b")}
    *empty, state = gdn_conv_prep(**args | none)
    assert [len(r) for r in empty] == [0] * 5
    assert bits(state) == bits(args["initial_state"])
    assert not gdn_conv_prep(**args | none | {"initial_state": None})[5].any()


COMPILE = """
import re
from tests.triton_impl.hopper import compile_for_hopper
from polyfuse.triton_impl.gdn_conv_prep import _kernel, _tile

pool = ("slots_ptr", "valid_ptr")
absent_ones = ("bias_ptr", "state_ptr", "cu_ptr", *pool)
for sequences, absent, interleaved in (
    (1, absent_ones, False), (8, pool, False), (1, absent_ones, True), (8, pool, True), (8, (), False)
):
    rows, *tile = _tile(4096, sequences, 16, 128, 32, 128)
    types = {n: "*bf16" if n.endswith("_ptr") else "i32" for n in _kernel.arg_names}
    types |= {"weight_ptr": "*i64", "g_ptr": "*fp32", "beta_ptr": "*fp32", "cu_ptr": "*i32", "eps": "fp32"}
    types |= {"slots_ptr": "*i32", "valid_ptr": "*u8"}
    constants = dict(weight_tap=1, a_column=1, b_column=1, weight_channel=1, H=16, K=128, HV=32, V=128, W=4)
    constants |= dict(GROUP=2) if interleaved else dict(GROUP=32, a_group=1, b_group=1)
    constants |= dict(L2NORM=True, G_EXP=False, ACTIVATE=True, INTERLEAVED=interleaved) | dict.fromkeys(absent)
    constants |= dict(state_slot=0, state_channel=0, state_tap=0) if "state_ptr" in absent else dict(state_channel=1)
    constants |= dict(zip(("HEADS", "HEADS_V", "GATE_TOKENS", "CHANNELS"), tile))
    aligned = [n for n in types if n.endswith(("_ptr", "_row", "_slot", "state_tap")) and n not in constants]
    code, spilled = compile_for_hopper(_kernel, types, constants, aligned, warps=4)
    stores = re.findall(r"st\\.global\\S*?\\.(v4\\.b32|\\w+) ", code)
    wide = len(re.findall(r"ld\\.global\\S*v4\\.b32", code))
    print(*set(stores), len(stores), wide, len(re.findall(r"cp\\.async\\.cg\\.shared\\.global", code)), spilled)
"""


@pytest.mark.slow
def test_compiles_for_hopper_with_16_byte_accesses(run_uninterpreted: Callable[[str], list[str]]) -> None:
    """Sizes and number of stores, number of loads of 16 bytes and of those fetched ahead, what spills; without a GPU.

    First one sequence with all that is optional absent, then several with all of it; then both of an interleaved x,
    which is read in accesses of the same size; and last several that have their states in a pool.
    """
    one, several = "v4.b32 18 11 24 []", "v4.b32 18 22 24 []"
    assert run_uninterpreted(COMPILE) == [one, several, one, several, several]
