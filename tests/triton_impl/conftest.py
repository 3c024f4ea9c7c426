"""Fixtures for the tests of kernels. A test file calls the module of its op `module`."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polyfuse._torch import memory
from polyfuse.triton_impl import _launch
from polyfuse.triton_impl._common import INTERPRETED
from polyfuse.triton_impl._plans import Plans
from tests.triton_impl.helpers import POISON

ROOT = Path(__file__).parents[2]


@pytest.fixture
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The launch grids of the op's kernel, as they happen."""
    kernel, grids, call = request.module.module._launch.kernel, [], _launch.Launch.__call__

    def recording(launch: _launch.Launch, grid: tuple[int, int, int], *arguments: Any) -> None:
        if launch.kernel is kernel:
            grids.append(grid)
        call(launch, grid, *arguments)

    monkeypatch.setattr(_launch.Launch, "__call__", recording)
    return grids


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What each launch of any kernel passes, as they happen."""
    seen, call = [], _launch.Launch.__call__

    def recording(launch: _launch.Launch, grid: tuple[int, int, int], *arguments: Any) -> None:
        seen.append(arguments)
        call(launch, grid, *arguments)

    monkeypatch.setattr(_launch.Launch, "__call__", recording)
    return seen


@pytest.fixture
def forget_plans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """For a test that changes what plans are made from: there are none of the op, and again none after each call."""
    module = request.module.module
    free = module._plans.free

    def forget() -> None:
        monkeypatch.setattr(module, "_plans", Plans(module._plan, free))

    forget()
    return forget


@pytest.fixture
def remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers remember what was compiled, as on CUDA, also where the kernel is interpreted, and start that alone."""
    monkeypatch.setattr(_launch, "ONLY_DTYPE_AND_ALIGNMENT", True)
    monkeypatch.setattr(_launch, "STARTED_DIRECTLY", False)
    if INTERPRETED:
        monkeypatch.setattr(_launch, "current_device_index", lambda: None)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is POISON, so that an element left unwritten shows."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: Any, **options: Any) -> torch.Tensor:
            tensor = allocate(*args, **options)
            storage: Any = tensor.untyped_storage()
            storage.fill_(POISON)
            return tensor

        return allocate_poisoned

    monkeypatch.setattr(memory, "deterministic", lambda: True)  # new memory comes from torch.empty_strided
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def run_afresh(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs code in a fresh process, in an environment changed by keywords, and gives the lines that it prints."""

    def run(code: str, **changed: str) -> list[str]:
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=inherited | {"TRITON_CACHE_DIR": str(tmp_path), **changed},
            cwd=ROOT,  # where the code finds `tests`
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.fixture
def run_uninterpreted(run_afresh: Callable[..., list[str]]) -> Callable[[str], list[str]]:
    """Runs code in a fresh process that does not interpret kernels, and gives the lines that it prints."""
    return lambda code: run_afresh(code, TRITON_INTERPRET="0")
