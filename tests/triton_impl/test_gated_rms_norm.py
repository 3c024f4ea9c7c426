"""The Triton kernel of `gated_rms_norm`: right in one launch, and bit by bit the same in every tile and layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import polyfuse
from polyfuse.conformance import Case, Trial, cases, make_inputs, place
from polyfuse.dispatch import to_numpy
from polyfuse.spec import OPS, Unsupported
from polyfuse.spec.gated_rms_norm import NAME
from polyfuse.triton_impl import gated_rms_norm as module
from polyfuse.triton_impl.gated_rms_norm import TILES, gated_rms_norm
from tests.triton_impl.helpers import DEVICE

SPEC = OPS[NAME]
BF16 = dict.fromkeys(("T", "gate", "weight"), "bfloat16")
CASES = [
    *(case for case in cases(NAME) if case.repeat == 1),
    Case("qwen3_next_80b", {"...": (3, 16, 2), "V": 128}, {}, BF16, layout={"gate": "sliced"}),
    Case("one_token", {"...": (1, 32), "V": 128}, {}, BF16),
    Case("long_row", {"...": (2,), "V": 5000}, {}, BF16),
    Case("many_rows", {"...": (70, 64), "V": 64}, {}, BF16, layout={"gate": "sliced", "x": "row_strided"}),
]

# NumPy's, from the interpreter: 0 * inf in a row that holds an infinity, and an exponential beyond float32.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def bits(x: torch.Tensor) -> bytes:
    return to_numpy(x).tobytes()


def arguments(case: Case) -> dict[str, Any]:
    return place(make_inputs(SPEC, case), "torch", DEVICE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle_in_one_launch(case: Case, launches: list[tuple[int, ...]], poisoned_memory: None) -> None:
    trial = Trial(NAME, case, 0)
    values, call = trial.inputs()
    args = place(values, "torch", DEVICE)
    before = {k: bits(v) for k, v in args.items() if isinstance(v, torch.Tensor)}
    y = gated_rms_norm(**args)
    assert trial.check(y, call) is None
    assert y.is_contiguous()
    assert {k: bits(args[k]) for k in before} == before
    assert len(launches) == (y.numel() > 0)


def test_a_row_computed_by_hand() -> None:
    # Mean squares of 6 and 0 and eps 3: the roots are 3 and sqrt(3). sigmoid(0) = 1/2.
    x = torch.tensor([[2.0, 2.0, 4.0], [0.0, 0.0, 0.0]], device=DEVICE)
    x[0, 2] = 10.0**0.5
    weight = torch.tensor([2.0, -1.0, 0.0], device=DEVICE)
    y = gated_rms_norm(x, torch.zeros_like(x), weight, eps=3.0, activation="sigmoid", weight_offset=1.0)
    assert y[0].tolist() == pytest.approx([1.0, 0.0, 10.0**0.5 / 6], rel=1e-6)
    assert y[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [72, 128])
def test_rows_do_not_depend_on_batch_layout_or_tile(width: int, dtype: str) -> None:
    """Alone and together, in large and in small tiles, in every layout that the numbers may have: the same bits."""
    args = arguments(Case("rows", {"...": (6, 5, 2), "V": width}, {}, dict.fromkeys(BF16, dtype)))
    want = gated_rms_norm(**args)

    def same(**changed: Any) -> None:
        got = gated_rms_norm(**args | changed)
        rows = slice(0, len(got)) if len(got) == 6 else slice(2, 2 + len(got))
        assert bits(got) == bits(want[rows])

    for name in ("x", "gate"):
        whole = args[name]
        wide = whole.new_full((7, 7, 5, width), float("nan"))
        sliced = wide[1:, 1:6, 2:4]
        shifted = whole.new_zeros(whole.numel() + 1)[1:].view(whole.shape)
        for layout in (sliced, shifted, whole.mT.contiguous().mT, whole.transpose(0, 2).contiguous().transpose(0, 2)):
            same(**{name: layout.copy_(whole)})
    same(x=args["x"][2:3], gate=args["gate"][2:3])
    same(x=args["x"][2:5], gate=args["gate"][2:5])
    for tile in ((width, 1), (4096, 4), *(values for _, values in TILES.ranges)):
        with TILES.using(lambda elements: tile):  # noqa: B023
            same()


@pytest.mark.parametrize(
    ("shape", "x_strides", "gate_strides", "dims"),
    [
        ((9, 4, 2), (8, 2, 1), (8, 2, 1), [(72, 1, 1)]),
        ((9, 4, 2), (8, 2, 1), (48, 12, 1), [(36, 2, 12), (2, 1, 1)]),  # heads side by side in a projection
        ((9, 4, 2), (8, 2, 1), (50, 12, 1), [(9, 8, 50), (4, 2, 12), (2, 1, 1)]),  # with something behind them
        ((9, 4, 2), (8, 2, 1), (0, 0, 1), [(36, 2, 0), (2, 1, 1)]),  # one gate for all heads
        ((1, 4, 1), (99, 2, 7), (5, 2, 3), [(4, 2, 2)]),
        ((), (), (), []),
    ],
)
def test_rows_have_as_few_dimensions_as_their_strides_allow(
    shape: tuple[int, ...], x_strides: tuple[int, ...], gate_strides: tuple[int, ...], dims: list[Any]
) -> None:
    assert module._merged(shape, x_strides, gate_strides) == dims


def test_only_what_cannot_be_read_in_place_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    contiguous = torch.Tensor.contiguous

    def noted(x: torch.Tensor) -> torch.Tensor:
        copy = contiguous(x)
        copied.extend([x.shape] if copy.data_ptr() != x.data_ptr() else [])
        return copy

    monkeypatch.setattr(torch.Tensor, "contiguous", noted)
    for layouts, copies in (
        ({"gate": "sliced", "x": "sliced"}, 0),
        ({"gate": "second_half", "x": "row_strided"}, 0),
        ({"gate": "sliced", "x": "column_strided"}, 1),
        ({"gate": "column_strided", "x": "column_strided"}, 2),
    ):
        args = arguments(Case("copies", {"...": (4, 3, 2), "V": 16}, layout=layouts))
        gated_rms_norm(**args)  # which finds out what to copy
        copied.clear()
        gated_rms_norm(**args)
        assert len(copied) == copies, layouts


def test_rows_of_one_element_with_more_strides_than_a_program_counts_in() -> None:
    args = arguments(Case("narrow", {"...": (2, 2, 2, 2, 2), "V": 1}, layout={"gate": "sliced"}))
    apart = args["x"].new_zeros(*args["x"].shape[:-1], 5)[..., :1].copy_(args["x"])
    assert apart.stride(-2) == 5
    one = apart.as_strided(apart.shape, (*apart.stride()[:-1], 7))
    assert bits(gated_rms_norm(**args | {"x": one})) == bits(gated_rms_norm(**args))


@pytest.mark.parametrize("far", ["x", "gate"])
def test_offsets_past_2_31(far: str, tmp_path: Path) -> None:
    """Rows 2**30 elements apart, in a sparse file."""
    args = arguments(Case("far", {"...": (3, 2), "V": 4}, {}, BF16))
    strides = (2**30, 6, 1)
    size = 2 * strides[0] + 64
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
    memory.as_strided((3, 2, 4), strides).copy_(args[far])
    apart = memory.to(DEVICE).as_strided((3, 2, 4), strides)
    assert size > 2**31
    assert bits(gated_rms_norm(**args | {far: apart})) == bits(gated_rms_norm(**args))


def test_rows_that_are_numbered_in_64_bits(forget_plans: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(Case("wide", {"...": (5, 3, 2), "V": 8}, layout={"gate": "sliced"}))
    want = gated_rms_norm(**args)
    monkeypatch.setattr(module, "WIDE_ROWS", 1)
    forget_plans()
    assert bits(gated_rms_norm(**args)) == bits(want)


def test_a_row_that_no_program_can_hold_is_refused() -> None:
    x = torch.zeros(1, 2**15 + 1, device=DEVICE)
    with pytest.raises(Unsupported, match="V=32769: must be 0 to 32768"):
        polyfuse.gated_rms_norm(x, x, x[0], backend="triton")


COMPILE = """
import re
from tests.triton_impl.hopper import compile_for_hopper
import torch
from polyfuse.triton_impl.gated_rms_norm import TILES, _kernel, _rows

CPU = torch.device("cpu")
for rows, dims in ((32, 1), (8192 * 32, 1), (8192 * 32, 2), (8192 * 32, 3)):
    gate = {1: (4096, 256, 128, 1), 2: (2**13, 2**9, 128, 1), 3: (2**14, 2**9, 128, 1)}[dims]
    tile = TILES.choose(rows * 128, CPU)
    _, _, fixed, warps = _rows((rows // 32, 16, 2, 128), (4096, 256, 128, 1), gate, True, *tile)
    assert fixed[6] == dims
    types = {n: "*bf16" if n.endswith("_ptr") else "i32" for n in _kernel.arg_names} | {"eps": "fp32", "offset": "fp32"}
    constants = dict(zip(("DIMS", "V", "SILU", "WIDE", "ROWS"), fixed[6:]))
    aligned = [n for n in types if n.endswith(("_ptr", "_stride"))]
    code, spilled = compile_for_hopper(_kernel, types, constants, aligned, warps)
    loads = re.findall(r"ld\\.global\\S*evict_first\\S*?\\.(v4\\.b32|\\w+) ", code)
    stores = re.findall(r"st\\.global\\S*?\\.(v4\\.b32|\\w+) ", code)
    print(*sorted({*loads, *stores}), len(loads), len(stores), code.count(".shared"), code.count("bar.sync"), spilled)
"""


@pytest.mark.slow
def test_compiles_for_hopper_with_16_byte_accesses(run_uninterpreted: Callable[[str], list[str]]) -> None:
    """Accesses to x, gate and y, how many a thread makes, shared memory and barriers, what spills; needs no GPU."""
    assert run_uninterpreted(COMPILE) == ["v4.b32 2 1 0 0 []", *["v4.b32 4 2 0 0 []"] * 3]
