from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import registry, to_numpy
from polyfuse.reference.gated_delta_rule import formula
from polyfuse.triton_impl import gated_delta_rule as module
from polyfuse.triton_impl._common import INTERPRETED
from polyfuse.triton_impl.gated_delta_rule import gated_delta_rule
from tests.rule_pools import NO_POOL
from tests.triton_impl.helpers import DEVICE

OP = "gated_delta_rule"
ENDS = [0, 70, 70, 71, 199]
SLOW = ("dims_k128", "dims_k256", "decode")
CASES = [case for case in cases(OP) if case.repeat == 1 and not case.name.startswith(SLOW)]
# The interpreter takes up to a second for each.
QUICK = [pytest.param(case, marks=[pytest.mark.slow] if number % 8 else []) for number, case in enumerate(CASES)]

# NumPy's, from the interpreter: what an infinity gives.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def arguments(**changed: Any) -> dict[str, Any]:
    """Four packed sequences of 200 rows, one of them empty and one row outside, with initial states."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    q, k = (torch.nn.functional.normalize(normal(200, 1, 24), dim=-1).bfloat16() for _ in range(2))
    args = {"q": q, "k": k, "v": normal(200, 2, 40).bfloat16(), "g": -normal(200, 2).abs(), "beta": normal(200, 2)}
    args["beta"] = args["beta"].sigmoid()
    args |= {"initial_state": normal(4, 2, 24, 40), "cu_seqlens": torch.tensor(ENDS)}
    return {**{name: x.to(DEVICE) for name, x in args.items()}, "output_final_state": True, **changed}


def of_sequence(args: dict[str, Any], i: int, rows: slice = slice(None)) -> dict[str, Any]:
    """The arguments of one sequence alone, of some of its rows."""
    mine: dict[str, Any] = {name: args[name][ENDS[i] : ENDS[i + 1]][rows] for name in ("q", "k", "v", "g", "beta")}
    return {**args, **mine, "cu_seqlens": None, "initial_state": args["initial_state"][i : i + 1]}


def bits(x: torch.Tensor) -> bytes:
    return to_numpy(x).tobytes()


def same(results: Any, wanted: Any) -> bool:
    return all(bits(result) == bits(want) for result, want in zip(results, wanted, strict=True))


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_cases(case: Case) -> None:
    assert Trial(OP, case, 0).on(registry().get("triton"), DEVICE) == ("passed", "")


def test_packed_sequences_are_separate_ones(poisoned_memory: None) -> None:
    args = arguments()
    o, final = gated_delta_rule(**args)
    for i in (0, 2, 3):
        assert same(gated_delta_rule(**of_sequence(args, i)), (o[ENDS[i] : ENDS[i + 1]], final[i : i + 1])), i
    assert bits(final[1]) == bits(args["initial_state"][1])
    assert not o[199:].any()


def test_a_sequence_in_two_calls() -> None:
    """Cut where a chunk ends."""
    args = arguments()
    whole = gated_delta_rule(**of_sequence(args, 3))
    first = gated_delta_rule(**of_sequence(args, 3, slice(64)))
    second = gated_delta_rule(**of_sequence(args, 3, slice(64, None)) | {"initial_state": first[1]})
    assert same((torch.cat([first[0], second[0]]), second[1]), whole)


@pytest.mark.skipif(not INTERPRETED.value, reason="for another block a compiler may take other instructions")
@pytest.mark.parametrize("columns", [16, 64])
def test_a_block_of_the_value_changes_no_bit(
    columns: int, forget_plans: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy's own product, in which the interpreter computes, sums in another order for another width."""
    matmul = np.matmul
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: matmul(a, b, dtype=np.float64).astype(dtype))
    args = arguments()
    whole = gated_delta_rule(**args)
    forget_plans()
    monkeypatch.setattr(module, "_tiling", lambda *sizes: module.Tiling(4, columns, 4, 1))
    assert same(gated_delta_rule(**args), whole)


def test_nan_stays_in_its_sequence_and_outside(poisoned_memory: None) -> None:
    args = arguments()
    clean = gated_delta_rule(**args)
    for name in ("q", "k", "v", "g", "beta"):
        args[name][70:71], args[name][199:] = torch.nan, torch.nan
    o, final = gated_delta_rule(**args)
    assert o[70:71].isnan().all()
    assert final[2].isnan().all()
    assert same((o[:70], o[71:], final[[0, 1, 3]]), (clean[0][:70], clean[0][71:], clean[1][[0, 1, 3]]))


def test_equal_keys_that_are_not_forgotten() -> None:
    """The powers of their matrix reach 10^18; the entries of its inverse are 1, -1 and 0."""
    args = of_sequence(arguments(), 0) | {"initial_state": None}
    args["g"], args["beta"] = torch.zeros_like(args["g"]), torch.ones_like(args["beta"])
    args |= {"q": args["q"].float(), "k": args["k"][:1].expand(70, 1, 24).float(), "v": args["v"].float()}
    arrays: dict[str, Any] = {name: to_numpy(x) if isinstance(x, torch.Tensor) else x for name, x in args.items()}
    for result, wanted in zip(gated_delta_rule(**args), formula(**arrays, scale=None, **NO_POOL), strict=True):
        assert abs(to_numpy(result) - wanted).max() < 1e-5


def test_more_sequences_than_are_looked_at_together() -> None:
    """Most of them are empty."""
    ends = [0] * module.SEARCH.value + [70, 70, 71, 199]
    args = arguments(cu_seqlens=torch.tensor(ends, device=DEVICE), initial_state=None)
    args |= {name: args[name][:, :1] for name in ("v", "g", "beta")}
    o, final = gated_delta_rule(**args)
    few = gated_delta_rule(**args | {"cu_seqlens": torch.tensor(ENDS, device=DEVICE)})
    assert same((o, final[-4:]), few)
    assert not final[:-4].any()


def test_slices_of_one_projection_are_read_where_they_lie(passed: list[tuple[Any, ...]]) -> None:
    x = torch.zeros(3, 2 * 16 + 2 * 16 + 4 * 8, device=DEVICE)
    q, k, v = x[:, :32].unflatten(1, (2, 16)), x[:, 32:64].unflatten(1, (2, 16)), x[:, 64:].unflatten(1, (4, 8))
    gates = torch.zeros(3, 2, 4, device=DEVICE)
    gated_delta_rule(q, k, v, gates[:, 0], gates[:, 1])
    given = [(x.data_ptr(), x.stride()) for x in (q, k, gates[:, 0], gates[:, 1], q, k, v)]
    assert [(x.data_ptr(), x.stride()) for x in [*passed[0][:4], *passed[1][:3]]] == given


@pytest.mark.parametrize("apart", [2**30, 2**31])
def test_offsets_past_2_31(apart: int, tmp_path: Path) -> None:
    """Rows of q, k and v 2**31 and more elements from the first one, in a sparse file."""
    args = of_sequence(arguments(), 0, slice(3)) | {"initial_state": None}
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * apart + 128, dtype=torch.bfloat16)
    memory, far = memory.to(DEVICE), dict[str, Any]()
    for name, start in (("q", 0), ("k", 24), ("v", 48)):
        view = memory[start:].as_strided(args[name].shape, (apart, args[name].shape[2], 1))
        far[name] = view.copy_(args[name])
    assert far["v"].stride(0) == apart
    assert same(gated_delta_rule(**args | far), gated_delta_rule(**args))


def test_nothing_to_compute_is_no_launch(launches: list[tuple[int, ...]], poisoned_memory: None) -> None:
    args = arguments(cu_seqlens=torch.zeros(5, dtype=torch.int32, device=DEVICE))
    none: dict[str, Any] = {name: args[name][:0] for name in ("q", "k", "v", "g", "beta")}
    o, final = gated_delta_rule(**args | none)
    assert o.shape == (0, 2, 40)
    assert bits(final) == bits(args["initial_state"])
    assert not gated_delta_rule(**args | none | {"initial_state": None})[1].any()
    narrow: dict[str, Any] = {name: args[name][..., :0] for name in ("q", "k")}
    o, final = gated_delta_rule(**args | narrow | {"initial_state": None})
    assert not o.any()
    assert final.shape == (4, 2, 0, 40)
    assert launches == []


COMPILE = """
import re
from tests.triton_impl.hopper import compile_for_hopper
import triton.language as tl
from polyfuse.triton_impl import _products, gated_delta_rule as module

for name, precision in (("FP32", "tf32x3"), ("TO_BF16", "tf32")):  # as where torch has CUDA
    setattr(_products, name, tl.constexpr(precision))
    setattr(module, name, tl.constexpr(precision))
tiling = module._tiling(128, 128, 2)
sizes = dict(H=16, HV=32, COLUMNS=128, K=128, V=128, DTYPE=tl.bfloat16)
scan = dict(BLOCK_V=tiling.block_v, OFFSET=tl.int32, STAGES=tiling.stages, initial_value=1, final_value=1)
for present in (False, True):
    absent = dict.fromkeys(("index_ptr", "has_ptr"))
    absent |= {} if present else dict.fromkeys(("cu_ptr", "initial_ptr"))
    for kernel, warps, more in (
        (module._prepare, tiling.prepare_warps, dict(g_head=1, beta_head=1)),
        (module._scan, tiling.warps, dict(scan, FINAL=present)),
    ):
        types = {n: "*bf16" if n.endswith("_ptr") else "i32" for n in kernel.arg_names} | {"scale": "fp32"}
        floats = "g_ptr beta_ptr decay_ptr initial_ptr final_ptr".split()
        types |= dict.fromkeys(floats, "*fp32") | {"cu_ptr": "*i32"}
        constants = {n: x for n, x in (sizes | more | absent).items() if n in kernel.arg_names}
        unaligned = {*constants, "length", "sequences", "slots", "scale"}
        aligned = [n for n in kernel.arg_names if n not in unaligned]
        code, _ = compile_for_hopper(kernel, types, constants, aligned, warps)
        print(code.count("wgmma.mma_async"), "cp.async.cg.shared" in code, bool(re.search(r"st.global\\S*v4", code)))
"""


@pytest.mark.slow
def test_compiles_for_hopper(run_uninterpreted: Callable[[str], list[str]]) -> None:
    """The scan has products on matrix units of 64 rows, tiles fetched ahead and stores of 16 bytes; without a GPU."""
    assert run_uninterpreted(COMPILE) == ["0 False True", "32 True True"] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 40 GB of an accelerator's memory")
def test_results_and_states_past_2_31_elements() -> None:
    """4,224 packed sequences of 128 rows: 2.2e9 elements of results and of states; each run of 64 gives its bits."""
    count, part, length = 4224, 64, 128

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)

    rows = part * length
    few = {name: torch.nn.functional.normalize(normal(rows, 16, 128), dim=-1) for name in ("q", "k")}
    few |= {"v": normal(rows, 32, 128), "g": -normal(rows, 32).float().abs(), "beta": normal(rows, 32).sigmoid()}
    state = normal(part, 32, 128, 128) / 8
    many = {name: x.repeat(count // part, *[1] * (x.ndim - 1)) for name, x in few.items()}
    assert many["v"].numel() > 2**31
    states = state.repeat(count // part, 1, 1, 1)
    ends = torch.arange(count + 1, device=DEVICE) * length
    o, final = gated_delta_rule(**many, initial_state=states, cu_seqlens=ends, output_final_state=True)
    wanted = gated_delta_rule(**few, initial_state=state, cu_seqlens=ends[: part + 1], output_final_state=True)
    assert torch.equal(o.view(-1, *wanted[0].shape), wanted[0].expand(count // part, *wanted[0].shape))
    assert torch.equal(final.view(-1, *wanted[1].shape), wanted[1].expand(count // part, *wanted[1].shape))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_keys_of_whole_blocks_with_rows_side_by_side_are_copied(dtype):
    case = Case(
        f"column_strided-{dtype}",
        {"L": 5, "H": 1, "HV": 1, "K": 16, "V": 4, "S": 1},
        {"output_final_state": True},
        {"T": dtype},
        fill={"q": "unit", "k": "unit", "g": "decay", "beta": "gate"},
        layout={"q": "column_strided", "k": "column_strided"},
    )
    assert Trial(OP, case, 0).on(registry().get("triton"), DEVICE) == ("passed", "")
