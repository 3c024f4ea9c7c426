"""Tiles: the measured ones of a device, else the rule; frozen, an error."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from polyfuse.spec import SpecError
from polyfuse.triton_impl import _tuning
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl._tuning import Tiles

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
SCALE = tl.constexpr(2)


@triton.jit
def _part(x):
    return x * SCALE


@triton.jit
def _kernel(x_ptr):
    tl.store(x_ptr, _part(tl.load(x_ptr)))


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Tiles:
    monkeypatch.delenv("POLYFUSE_TUNING", raising=False)
    monkeypatch.setattr(_tuning, "device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(_tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(_tuning, "tuned_ranges", lambda *key: found.get(key))
    found.clear()
    return Tiles(Launcher("an_op", _kernel), ("rows", "warps"), ((10, (1, 2)), (2**63, (4, 8))), ((1, 4), (2, 8)))


found: dict[Any, Any] = {}


def test_the_rule_where_nothing_was_measured(tiles: Tiles) -> None:
    for device in (CPU, GPU):
        assert [tiles.choose(size, device) for size in (1, 10, 11, 2**40)] == [(1, 2), (1, 2), (4, 8), (4, 8)]


def test_what_was_measured_for_this_kernel_on_this_device(tiles: Tiles) -> None:
    measured = ((5, {"warps": 16, "rows": 32}), (None, {"rows": 64, "warps": 1}))
    found["NVIDIA X", "an_op", tiles.source(), triton.__version__, "sm_90"] = measured
    assert [tiles.choose(size, GPU) for size in (5, 6)] == [(32, 16), (64, 1)]
    assert tiles.choose(5, CPU) == (1, 2)


def test_frozen_a_miss_is_an_error(tiles: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYFUSE_TUNING", "frozen")
    with pytest.raises(
        SpecError, match=r"^an_op: POLYFUSE_TUNING=frozen: expected tiles measured on NVIDIA X .* got none; try"
    ):
        tiles.choose(1, GPU)
    assert tiles.choose(1, CPU) == (1, 2)  # interpreted: nothing to measure
    found["NVIDIA X", "an_op", tiles.source(), triton.__version__, "sm_90"] = ((None, {"rows": 64, "warps": 1}),)
    assert tiles.choose(1, GPU) == (64, 1)


def test_another_word_for_frozen_is_an_error(tiles: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYFUSE_TUNING", "cold")
    with pytest.raises(SpecError, match="environment variable POLYFUSE_TUNING: expected frozen, got 'cold'"):
        tiles.choose(1, GPU)


def test_what_is_forced_and_then_not(tiles: Tiles) -> None:
    with tiles.using(lambda size: (size, 1)):
        assert tiles.choose(7, GPU) == (7, 1)
    assert tiles.choose(7, GPU) == (1, 2)


def test_the_source_is_that_of_all_that_is_compiled(tiles: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant and a function of the kernel count, and the order in which they are found does not."""
    first = tiles.source()
    assert len(first) == 16
    assert tiles.source() == first
    monkeypatch.setitem(globals(), "SCALE", tl.constexpr(3))
    assert tiles.source() != first
    monkeypatch.setitem(globals(), "SCALE", tl.constexpr(2))
    assert tiles.source() == first
    monkeypatch.setitem(globals(), "_part", _kernel)
    assert tiles.source() != first
