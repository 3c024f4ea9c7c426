"""Kernels that note how they are launched, and what fresh memory holds in the tests of kernels."""

from typing import Any

from polyfuse.triton_impl._common import INTERPRETED

DEVICE = "cpu" if INTERPRETED.value else "cuda"
POISON = 0xFF  # of each byte: NaN in float32, bfloat16, float16 and two fp8 dtypes, -1 in an integer


class RecordingKernel:
    """Notes the grid of each launch that goes through it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return self.kernel[grid]


class CompilingKernel:
    """Notes whether each launch went through it or through what it compiled, with the arguments and options.

    `kernel`, if there is one, computes in both cases.
    """

    def __init__(self, kernel: Any = None) -> None:
        self.kernel = kernel
        self.launches: list[tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, int]]] = []

    @property
    def how(self) -> list[str]:
        return [how for how, *_ in self.launches]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*arguments: Any, **options: int) -> Any:
            self.launch("jit", grid, arguments, options)
            return Compiled(self, options)

        return start

    def launch(self, how: str, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, int]) -> None:
        self.launches.append((how, grid, arguments, options))
        if self.kernel is not None:
            self.kernel[grid](*arguments, **options)


class Compiled:
    def __init__(self, kernel: CompilingKernel, options: dict[str, int]) -> None:
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.kernel.launch("compiled", grid, arguments, self.options)
