"""Warms a model's calls for a GPU that is not there, in a process that does not interpret kernels.

Kernels are compiled and not launched; arrays are on the CPU.
"""

import sys

import tests.triton_impl.every_arch as arch  # isort: skip

import polyfuse.triton_impl
from polyfuse import use_backend
from polyfuse.bench.warmup import Warmup, compile_calls
from polyfuse.configs import model_configs
from polyfuse.conformance.cases import model_case
from polyfuse.triton_impl import _launch


def compile_only(self: _launch.Launch, grid: tuple[int, int, int], *arguments: object) -> None:
    self.kernel.run(*arguments, grid=grid, warmup=True, **self.options)


def main(model: str, *ops: str) -> None:
    """Print the calls, then how often each kernel was compiled, and how often read from the cache."""
    arch.pretend(90)
    polyfuse.triton_impl.unavailable = lambda: None  # type: ignore[assignment]
    _launch.Launch.__call__ = compile_only  # type: ignore[method-assign]
    bench = model_configs()[model].bench
    chosen = {op: [model_case(model, shape) for shape in bench[op]] for op in ops}
    with use_backend("triton", strict=True):
        result = compile_calls(Warmup("none", model), chosen, "cpu", 2)
    print(result.calls)
    for kernel in result.kernels:
        if not 0 < kernel.seconds < result.seconds:
            raise SystemExit(f"{kernel} in {result.seconds} s")
        print(kernel.module, kernel.name, "cached" if kernel.cached else "compiled")


if __name__ == "__main__":
    main(*sys.argv[1:])
