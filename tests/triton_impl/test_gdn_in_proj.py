"""The Triton backend of `gdn_in_proj`: every strategy against the oracle, and `fused` as one launch."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import polyfuse
from polyfuse import Unsupported
from polyfuse._torch.projections import Projection
from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import registry
from polyfuse.runtime import stack_weights
from polyfuse.triton_impl import gdn_in_proj as module
from polyfuse.triton_impl._common import INTERPRETED

OP = "gdn_in_proj"
DEVICE = "cpu" if INTERPRETED.value else "cuda"
FUSED = {"strategy": "fused"}
CASES = [
    *(case for case in cases(OP) if case.repeat == 1),
    Case("over_64_rows", {"...": (70,), "hidden": 40, "N1": 50, "N2": 3}, FUSED, {"T": "bfloat16"}),
    Case("long_hidden", {"...": (2,), "hidden": 1000, "N1": 33, "N2": 33}, FUSED, {"T": "float16"}),
    Case(
        "four_over_64_rows",
        {"...": (70,), "hidden": 300, "N1": 33, "NZ": 31, "N2": 1, "NA": 40},
        FUSED,
        {"T": "bfloat16"},
        present=("w_z", "w_a"),
        layout={"w_qkvz": "column_strided", "w_z": "row_strided"},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case: Case) -> None:
    assert Trial(OP, case, 0).on(registry().get("triton"), DEVICE) == ("passed", "")


def operands(rows: int) -> list[torch.Tensor]:
    """x, w_qkvz, w_z, w_ba and w_a."""
    torch.manual_seed(0)
    return [torch.randn(n, 64, dtype=torch.bfloat16, device=DEVICE) for n in (rows, 96, 40, 8, 6)]


@pytest.mark.parametrize("given", ["", "z", "a", "za"])
def test_fused_is_one_launch_that_writes_every_element(launches: list[Any], poisoned_memory: None, given: str) -> None:
    x, w1, wz, w2, wa = operands(5)
    rest1, rest2 = (wz if "z" in given else None), (wa if "a" in given else None)
    results = module.fused(x, Projection(w1, rest1), Projection(w2, rest2))
    assert launches == [(3 + 1 + 2 * ("z" in given) + ("a" in given), 1, 1)]  # blocks of 32 columns of one weight
    for result, first, rest in zip(results, (w1, w2), (rest1, rest2), strict=True):
        weight = first if rest is None else torch.cat([first, rest])
        assert torch.allclose(result.float(), x.float() @ weight.float().T, atol=0.2)


def test_fused_reads_a_strided_weight_where_it_is(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x, w1, wz, w2, wa = operands(5)
    wanted = module.fused(x, Projection(w1, wz), Projection(w2, wa))
    turned = [weight.t().contiguous().t() for weight in (w1, wz, w2, wa)]
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    results = module.fused(x, Projection(*turned[:2]), Projection(*turned[2:]))
    assert all(map(torch.equal, results, wanted))
    assert len(launches) == 2


def test_nothing_to_compute_is_no_launch(launches: list[Any]) -> None:
    x, w1, wz, w2, wa = operands(0)
    assert [r.shape for r in module.fused(x, Projection(w1, wz), Projection(w2, wa))] == [(0, 136), (0, 14)]
    x = operands(3)[0]
    empty = Projection(w1[:0], wz[:0])
    assert [r.shape for r in module.fused(x, empty, Projection(w2[:0]))] == [(3, 0), (3, 0)]
    assert launches == []


def test_auto_without_a_measurement_is_fused_for_few_rows_on_a_gpu(
    launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyfuse._torch.projections._table", lambda device: {})
    x, w1, wz, w2, wa = operands(5)
    polyfuse.gdn_in_proj(x, w1, w2, w_z=wz, w_a=wa, backend="triton")
    assert launches == ([(7, 1, 1)] if x.is_cuda else [])
    del launches[:]
    x = operands(65)[0]
    auto = polyfuse.gdn_in_proj(x, w1, w2, w_z=wz, w_a=wa, backend="triton")
    assert launches == []
    one_by_one = polyfuse.gdn_in_proj(x, w1, w2, w_z=wz, w_a=wa, strategy="sequential", backend="triton")
    assert all(map(torch.equal, auto, one_by_one))


def test_auto_is_fused_where_the_table_says_so(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    table = {(64, 136, 14, "bfloat16"): ((16, ("merged", "fused")), (None, ("sequential",)))}
    monkeypatch.setattr("polyfuse._torch.projections._table", lambda device: table)
    x, w1, wz, w2, wa = operands(17)
    polyfuse.gdn_in_proj(x, w1, w2, w_z=wz, w_a=wa, backend="triton")
    assert launches == []
    polyfuse.gdn_in_proj(x[:16], w1, w2, w_z=wz, w_a=wa, backend="triton")
    assert launches == [(7, 1, 1)]


def test_parallel_is_sequential_bit_for_bit() -> None:
    x, w1, wz, w2, wa = operands(70)
    one = polyfuse.gdn_in_proj(x, w1, w2, w_z=wz, w_a=wa, strategy="sequential", backend="triton")
    other = polyfuse.gdn_in_proj(x, w1, w2, w_z=wz, w_a=wa, strategy="parallel", backend="triton")
    assert all(map(torch.equal, one, other))


def test_merged_takes_weights_that_are_one_and_declines_others(launches: list[Any]) -> None:
    x, *weights = operands(5)
    message = "strategy merged: expected 4 weights that lie right behind one another in one storage"
    for w1, wz, w2, wa in (stack_weights(*weights), weights):
        options: Any = {"w_z": wz, "w_a": wa, "strategy": "merged", "backend": "triton"}
        with pytest.raises(Unsupported, match=message) if w1 is weights[0] else nullcontext():
            qkvz, ba = polyfuse.gdn_in_proj(x, w1, w2, **options)
            assert qkvz.stride() == ba.stride() == (150, 1)
            assert ba.data_ptr() == qkvz.data_ptr() + 136 * x.element_size()
    assert launches == []


COMPILE = """
import re
from tests.triton_impl.hopper import compile_for_hopper
from polyfuse.triton_impl.gdn_in_proj import BLOCK_K, BLOCK_N, _kernel

for absent in (["wz", "wa"], []):
    constants = {f"{w}_step": 1 for w in ("w1", "wz", "w2", "wa")} | {f"{w}_ptr": None for w in absent}
    constants |= dict(bias1_ptr=None, bias2_ptr=None, BLOCK_ROWS=16, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K)
    types = {n: "*bf16" if n.endswith("_ptr") else "i32" for n in _kernel.arg_names}
    sizes = ["hidden", "n1", "nz", "n2", "na"]
    aligned = [n for n in _kernel.arg_names if n.endswith(("_ptr", "_stride")) or n in sizes]
    code, _ = compile_for_hopper(_kernel, types, constants, [n for n in aligned if n not in constants], warps=4)
    copies = re.findall(r"cp\\.async\\.c[ag]\\.\\S+ \\[[^]]*\\], \\[[^]]*\\], (\\w+)", code)
    print(len(copies), set(copies), len(re.findall(r"ld\\.global", code)))
"""


@pytest.mark.slow
def test_compiles_for_hopper_with_16_byte_copies(run_uninterpreted: Callable[[str], list[str]]) -> None:
    """Asynchronous copies of weights and rows, their sizes, and other loads: a weight that is not given has none."""
    assert run_uninterpreted(COMPILE) == ["36 {'0x10'} 0", "72 {'0x10'} 0"]
