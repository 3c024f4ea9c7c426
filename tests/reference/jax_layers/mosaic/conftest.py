"""What the tests of the Mosaic GPU kernels share: JAX's GPU interpret mode, and their lowering for CUDA.

With JAX 0.10 they are skipped where absl-py is not installed, which its `mosaic_gpu` imports.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import jax
import pytest

from polyfuse.reference.pallas import mosaic

MOSAIC_CALL = "mosaic_gpu_v2"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The Pallas layer takes its Mosaic GPU kernels, as on a GPU that runs them: the programs of each one traced."""
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)
    plgpu = import_module("polyfuse.reference.pallas.mosaic.tiles").plgpu
    kernel = plgpu.kernel
    programs: list[int] = []

    def counted(*args: Any, grid: tuple[int, ...], **named: Any) -> Any:
        programs.extend(grid)
        return kernel(*args, grid=grid, **named)

    monkeypatch.setattr(plgpu, "kernel", counted)
    monkeypatch.setattr(mosaic, "PREFERRED", True)
    monkeypatch.setattr(mosaic, "usable", lambda: True)
    jax.clear_caches()
    yield programs
    jax.clear_caches()


@pytest.fixture
def interpreted(traced: list[int], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """`traced`, in GPU interpret mode on a CPU. The test fails if no Mosaic GPU kernel was traced."""
    tiles = import_module("polyfuse.reference.pallas.mosaic.tiles")
    if hasattr(tiles.plgpu, "InterpretGPUParams"):
        params = tiles.plgpu.InterpretGPUParams()
    else:  # JAX 0.10 interprets neither a load with a layout nor the cast to one
        params = import_module("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams()
        monkeypatch.setattr(tiles, "_load", lambda ref, **_: ref[...])
        monkeypatch.setattr(tiles.plgpu, "layout_cast", lambda x, _: x)
    kernel = tiles.plgpu.kernel
    monkeypatch.setattr(tiles.plgpu, "kernel", lambda *args, **named: kernel(*args, **named | {"interpret": params}))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cuda, **_: cuda(*operands))
    yield traced
    assert traced, "no Mosaic GPU kernel took the call"


@pytest.fixture
def mosaic_kernels(traced: list[int]) -> Callable[..., int]:
    """The function that counts the Mosaic GPU kernels in an op's call, lowered for CUDA."""

    def count(function: Any, *arguments: Any, **named: Any) -> int:
        unchecked = [jax.export.DisabledSafetyCheck.custom_call(MOSAIC_CALL)]
        exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=unchecked)
        return str(exported(*arguments, **named).mlir_module()).count(f"custom_call @{MOSAIC_CALL}")

    return count
