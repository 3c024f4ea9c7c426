"""Compiles the kernels of all ops for a GPU that need not be there, in a process that does not interpret them.

`python -m tests.triton_impl.every_arch once 100` compiles each kernel for sm_100 once, and with `models` in place of
`once` in every form that the calls of the models need, and once if they need it in none. With `quick` it is every
form of the cases of conformance at that level, and with `arrays` of these one for each choice of arrays that are there.
Further arguments are ops, in place of all. Prints a line for each: the
kernel and its module, seconds, and the bytes of the binary. Then one for each model, kernel and choice of attributes,
dtypes and arrays: how many forms that needs.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import triton  # before polyfuse, which chooses the interpreter where there is no GPU
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import numpy as np  # isort: skip
import torch  # isort: skip

from polyfuse.configs import model_configs
from polyfuse.conformance import Case, selected_for
from polyfuse.conformance.cases import cases, model_case
from polyfuse.conformance.inputs import Described, described
from polyfuse.dispatch import registry
from polyfuse.spec import OPS, bind
from polyfuse.triton_impl import _expert_products, _launch

launched: list[tuple[_launch.Launch, tuple[Any, ...]]] = []


def note(self: _launch.Launch, grid: tuple[int, int, int], *arguments: Any) -> None:
    """In place of a launch."""
    launched.append((self, arguments))


def calls_of(op: str, how: str, arch: int) -> Iterator[tuple[Case, str]]:
    """What the models call, then the core cases, which reach other kernels; and whose call a case is, if a model's."""
    capability = registry().get("triton").load(op).capability
    models = model_configs().items()
    found = [(model_case(name, shape), name) for name, config in models for shape in config.bench.get(op, [])]
    found += [(case, "") for case in cases(op) if case.name in OPS[op].core]
    if how in ("quick", "arrays"):
        found = [(case, "") for case, left_out in selected_for(op, "quick") if not left_out]
    for case, model in found:
        call = bind(OPS[op], described(OPS[op], case))
        if capability.refusal(call, "cuda", divmod(arch, 10)) is None:
            yield case, model


def arguments(op: str, case: Case) -> dict[str, Any]:
    """The arguments of a call; arrays have no values, so that large ones cost nothing."""
    values = described(OPS[op], case)
    for name, value in values.items():
        if isinstance(value, Described):
            values[name] = torch.empty(value.shape, dtype=getattr(torch, str(value.dtype)))
        elif isinstance(value, np.ndarray):
            values[name] = torch.from_numpy(value)
    return values | ({"strategy": "fused"} if "strategy" in values else {})


def launches_of(op: str, how: str, arch: int, forms: dict[str, set[_launch.Launch]]) -> Iterator[Any]:
    """The launches of an op's calls that are to be compiled, with their arguments.

    Into `forms` go those of each model and choice of attributes, dtypes and arrays.
    """
    function = registry().get("triton").load(op).function
    kernels, seen = set(), set()
    for case, model in calls_of(op, how, arch):
        launched.clear()
        with torch.no_grad():
            function(**arguments(op, case))
        for launch, passed in launched:
            there = launch.kernel, *[x is None for x in passed if how == "arrays"]
            if there not in kernels or (launch not in seen and (model if how == "models" else how == "quick")):
                kernels.add(there)
                seen.add(launch)
                yield launch, passed
            if model:
                forms.setdefault(f"{model}: {case.attrs} {case.dtypes} {case.present}", set()).add(launch)


def launches_of_experts(arch: int) -> Iterator[Any]:
    """The launches of Qwen3.5-35B-A3B's FP8 experts for 1, 64 and 2,048 tokens, with their arguments."""
    if divmod(arch, 10) < _expert_products.ARCH:
        return
    experts, chosen, hidden, inner = 256, 8, 2048, 512
    launched.clear()
    for tokens in (1, 64, 2048):
        rows = torch.empty(tokens * chosen, dtype=torch.int64)
        ends = torch.empty(experts, dtype=torch.int32)
        for count, k, n, index in ((tokens, hidden, 2 * inner, rows), (len(rows), inner, hidden, None)):
            x, scale = torch.empty(count, k, dtype=torch.float8_e4m3fn), torch.empty(count, k // 128)
            weight = torch.empty(experts, n, k, dtype=torch.float8_e4m3fn)
            weight_scale = torch.empty(experts, n // 128, k // 128)
            out = _expert_products.products(x, scale, weight, weight_scale, ends, index, torch.bfloat16)
        _expert_products.sums(out, torch.empty(tokens, chosen), rows.view(tokens, chosen), ends, by_place=False)
        _expert_products.route(rows.view(tokens, chosen), experts)
    yield from dict(launched).items()


def pretend(arch: int) -> None:
    """Stand in for a GPU of this architecture on which nothing is launched."""
    target = GPUTarget("cuda", arch, 32)
    calls = {"get_current_target": lambda: target, "get_current_device": lambda: 0, "get_current_stream": lambda _: 0}
    driver.set_active(SimpleNamespace(**calls))
    for name, module in list(sys.modules.items()):
        if name.startswith("polyfuse.triton_impl.") and hasattr(module, "_converts"):  # as a GPU does: here is a CPU
            vars(module)["_converts"] = lambda device, dtype: arch >= 89 and dtype != "float8_e4m3fnuz"
    triton.cdiv = triton.next_power_of_2 = None  # other packages put functions for plain integers in their places
    _launch._on_device = lambda op, device: nullcontext()
    _launch.Launch.__call__ = note  # type: ignore[method-assign]


def named(kernel: Any) -> str:
    """The module of a kernel, and its name."""
    return f"{kernel.__module__.rpartition('.')[2]} {kernel.__name__}"


def lopsided(ptx: str) -> list[str]:
    """The instructions by which a lane adds its own product, unrounded, to a number that another lane has rounded.

    Of two lanes that add up each other's products so, either has other bits.
    """
    shuffled = set(re.findall(r"shfl\.sync\.\w+\.b32\s+(%\w+)", ptx))
    fused = re.findall(r"fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+);", ptx)
    return [addend for addend in fused if addend in shuffled]


def main(how: str, arch: int, *only: str) -> None:
    ops = [op for op in only or OPS if op in registry().get("triton").implements]
    for op in ops:
        registry().get("triton").load(op)
    pretend(arch)
    compiled = set()
    forms: dict[str, set[_launch.Launch]] = {}
    of_ops = (found for op in ops for found in launches_of(op, how, arch, forms))
    for launch, passed in of_ops if only else chain(of_ops, launches_of_experts(arch)):
        kernel = launch.kernel
        compiled.add(kernel)
        start = perf_counter()
        made = kernel.run(*passed, grid=(1, 1, 1), warmup=True, **launch.options)
        if f".target sm_{arch}" not in made.asm["ptx"] or not made.asm["cubin"].startswith(b"\x7fELF"):
            raise SystemExit(f"{kernel.__module__}: {kernel.__name__}: no binary for sm_{arch}")
        if found := lopsided(made.asm["ptx"]):
            raise SystemExit(f"{named(kernel)}: {len(found)} lanes that have other bits than those beside them")
        print(named(kernel), f"{perf_counter() - start:.2f}", len(made.asm["cubin"]), flush=True)
    modules = [module for name, module in sys.modules.items() if name.startswith("polyfuse.triton_impl.")]
    known = [x for module in modules for x in vars(module).values() if isinstance(x, _launch.Launcher)]
    left = {x.kernel.__name__ for x in known if x.kernel not in compiled}
    if divmod(arch, 10) < _expert_products.ARCH:
        left -= {"_products", "_route", "_sums"}
    if left and not only:
        raise SystemExit(f"compiled by no call: {', '.join(sorted(left))}")
    for chosen, launches in forms.items():
        for name, count in Counter(named(launch.kernel) for launch in launches).items():
            print(f"{chosen} {name} {count}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
