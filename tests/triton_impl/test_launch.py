"""Launches reach the kernel that Triton compiles for their arguments, and Triton only when it has to be asked."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from polyfuse.triton_impl import _launch
from polyfuse.triton_impl._launch import Launch, Launcher
from tests.triton_impl.helpers import DEVICE, CompilingKernel

GRID = (5, 1, 1)
X = torch.zeros(64, device=DEVICE)


def launcher(kernel: CompilingKernel) -> Launcher:
    return Launcher("op", kernel, num_stages=3)


def test_arguments_grid_and_options_reach_the_kernel(remembers: None) -> None:
    launch = launcher(kernel := CompilingKernel())
    for grid in (GRID, (2, 3, 1)):
        launch(grid, (X, None), (X,), (7, 1e-6), (1, "e4m3"), 4)
    arguments = (X, None, X, 7, 1e-6, 1, "e4m3")
    options = {"enable_fp_fusion": True, "num_warps": 4, "num_stages": 3}
    assert kernel.launches == [("jit", GRID, arguments, options), ("compiled", (2, 3, 1), arguments, options)]


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": (X[1:], None)},  # begins at no multiple of 16 bytes
        {"inputs": (X.half(), None)},
        {"inputs": (X, X)},
        {"numbers": (2**31, None)},
        {"numbers": (7, 0.5)},
        {"numbers": (7.0, None)},
        {"fixed": (1, 3)},
        {"warps": 8},
    ],
    ids=str,
)
def test_another_kind_of_call_is_compiled_anew(change: dict[str, Any], remembers: None) -> None:
    launch = launcher(kernel := CompilingKernel())
    call: dict[str, Any] = {"inputs": (X, None), "outputs": (X,), "numbers": (7, None), "fixed": (1, 2), "warps": 4}
    for arguments in (call, call | change, call, call | change):
        launch(GRID, **arguments)
    assert kernel.how == ["jit", "jit", "compiled", "compiled"]


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": (X[4:], None)},
        {"numbers": (16, None)},
        {"numbers": (2**31 - 1, None)},
        {"outputs": (X.clone(),)},
    ],
    ids=str,
)
def test_another_call_of_the_same_kind_is_not(change: dict[str, Any], remembers: None) -> None:
    launch = launcher(kernel := CompilingKernel())
    call: dict[str, Any] = {"inputs": (X, None), "outputs": (X,), "numbers": (7, None), "fixed": (1, 2), "warps": 4}
    for arguments in (call, call | change):
        launch(GRID, **arguments)
    assert kernel.how == ["jit", "compiled"]


def test_a_launcher_forgets(remembers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "MOST_KINDS", 2)
    launch = launcher(kernel := CompilingKernel())
    for i in range(5):
        launch(GRID, (X,), (), (), (i,), 4)
    assert [kind[2] for kind in launch.launches] == [(4,)]
    assert kernel.how == ["jit"] * 5


def test_triton_is_asked_each_time_where_it_specialises_tensors_on_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "ONLY_DTYPE_AND_ALIGNMENT", False)
    launch = launcher(kernel := CompilingKernel())
    for _ in range(2):
        launch(GRID, (X,), (), (), (), 4)
    assert kernel.how == ["jit", "jit"]


def test_a_launch_is_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two devices, 0 is the current one: launches on 1 enter it, those on 0 enter nothing."""
    entered: list[int] = []

    def enter(index: int) -> Any:
        entered.append(index)
        return nullcontext()

    monkeypatch.setattr(_launch, "ONLY_DTYPE_AND_ALIGNMENT", True)
    monkeypatch.setattr(_launch, "STARTED_DIRECTLY", False)
    monkeypatch.setattr(_launch, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "device_index", enter)
    for index in (0, 1):
        launch = Launch("op", kernel := CompilingKernel(), torch.device("cuda", index), {"num_warps": 4})
        for _ in range(3):
            launch(GRID, X)
        assert kernel.how == ["jit", "compiled", "compiled"]
    assert entered == [1, 1, 1]


def test_another_device_is_another_kind() -> None:
    launch = launcher(CompilingKernel())
    on: list[Any] = [
        SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float32, data_ptr=lambda: 0) for index in (0, 1)
    ]
    first, second, again = (launch.find((x,), (), (), 4) for x in (*on, on[0]))
    assert [first.device.index, second.device.index] == [0, 1]
    assert again is first


def test_every_op_launches_what_triton_would(run_uninterpreted: Callable[[str], list[str]]) -> None:
    """Of each op, how many kernels some calls reach, and how many calls these are."""
    assert run_uninterpreted("import tests.triton_impl.triton_choice") == [
        "silu_mul_block_quant 14 19",
        "silu_mul_block_quant 7 9",
        "silu_mul_block_quant 10 13",
        "block_quant 12 14",
        "rms_norm_block_quant 14 18",
        "gdn_post_conv 27 30",
        "gdn_conv_prep 42 50",
        "gdn_decode 47 57",
        "gated_rms_norm 12 20",
        "gated_delta_rule 20 26",
        "segment_attention 1 14",
        "pos_embed_interpolate 17 26",
        "in_proj 23 30",
    ]
