"""Compile what the calls of a model need before the first of them comes: what `polyfuse warmup` does."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import polyfuse
from polyfuse.spec import OPS, SpecError, fail, not_installed

if missing := not_installed("polyfuse.warmup", "torch"):
    raise missing

from polyfuse.bench.results import Results, device_name
from polyfuse.bench.timing import seconds
from polyfuse.configs import model_configs
from polyfuse.conformance import Case
from polyfuse.conformance.cases import model_case
from polyfuse.conformance.inputs import Described, described
from polyfuse.dispatch import check_device, from_numpy

WORKERS = 8  # Triton and ptxas work outside of Python's lock


@dataclass(frozen=True)
class Kernel:
    """One form of a kernel: the module and function it is written in, and how long its compiler took.

    `cached` is one that an earlier process had compiled, and that was read from Triton's cache.
    """

    module: str
    name: str
    seconds: float
    cached: bool


@dataclass
class Warmup(Results):
    """What was compiled, for how many calls, in how many seconds of wall time."""

    model: str
    calls: int = 0
    seconds: float = 0.0
    kernels: list[Kernel] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return f"warmup_{self.model}_"


def warmup(model: str, device: str | None = None, *, ops: Sequence[str] = (), workers: int = WORKERS) -> Warmup:
    """Compile the kernels that a model's calls need on a device of this machine, ops side by side in threads.

    The calls are those of the file of `configs/models` that `model` names: each is made once, with arrays of zeros, on
    the backend that such a call gets here, so that all that a first call costs is behind it, in this process and, by
    Triton's cache, in later ones. Their arrays take the device's memory meanwhile. `device` is the current accelerator
    by default; `ops` are the ones to warm, all by default.

    Raises `SpecError` for an unknown model or device, and on a device for which nothing is compiled: a CPU.
    """
    import torch

    configs = model_configs()
    if model not in configs:
        fail("warmup", "model", f"one of {', '.join(configs)}", model)
    bench = configs[model].bench
    chosen = {op: [model_case(model, shape) for shape in bench[op]] for op in bench if not ops or op in ops}
    if not chosen:
        raise SpecError(f"warmup: ops: expected some of {', '.join(bench)}, which {model} calls, got {', '.join(ops)}")
    device = device or _accelerator()
    check_device("warmup: device", device, ["torch"])
    if torch.device(device).type == "cpu":
        expected = "an accelerator: on a CPU nothing is compiled, and Triton kernels are interpreted"
        fail("warmup", "device", expected, device)
    return compile_calls(Warmup(device_name(device), model), chosen, device, workers)


def compile_calls(result: Warmup, chosen: dict[str, list[Case]], device: str, workers: int) -> Warmup:
    """Make all calls, those of an op in one thread, and note what was compiled."""

    def call_all() -> None:
        with _noted(result.kernels), ThreadPoolExecutor(workers) as pool:
            # Each with the preferences of this thread, such as `use_backend`.
            calls = [partial(_call_all, op, cases, device) for op, cases in chosen.items()]
            tasks = [pool.submit(copy_context().run, call) for call in calls]
            result.calls += sum(task.result() for task in tasks)

    result.seconds = round(seconds(call_all), 3)
    result.kernels.sort(key=lambda kernel: -kernel.seconds)
    return result


def _call_all(op: str, cases: Sequence[Case], device: str) -> int:
    """Call an op once for each case; returns how many calls that were."""
    import torch

    with torch.no_grad():
        for case in cases:
            getattr(polyfuse, op)(**_arguments(op, case, device))
        if torch.device(device).type != "cpu":
            torch.accelerator.synchronize(torch.device(device))
    return len(cases)


def _arguments(op: str, case: Case, device: str) -> dict[str, Any]:
    """Every parameter of a call: arrays of zeros, and of values where the case gives them."""
    import numpy as np
    import torch

    values = described(OPS[op], case)
    for name, value in values.items():
        if isinstance(value, Described):
            values[name] = torch.zeros(value.shape, dtype=getattr(torch, str(value.dtype)), device=device)
        elif isinstance(value, np.ndarray):
            values[name] = from_numpy(value, "torch", device)
    return values


@contextmanager
def _noted(kernels: list[Kernel]) -> Iterator[None]:
    """Note what Triton compiles or reads from its cache, in any thread."""
    if find_spec("triton") is None:
        yield
        return
    from triton import knobs

    settings: Any = knobs.compilation
    outer = settings.listener

    def listen(*, src: Any, times: Any, cache_hit: bool, **others: Any) -> None:
        function = getattr(src, "fn", None)
        function = getattr(function, "fn", function)
        module = getattr(function, "__module__", "").removeprefix("polyfuse.")
        kernels.append(Kernel(module, src.name, round(times.total / 1e6, 3), cache_hit))
        if outer is not None:
            outer(src=src, times=times, cache_hit=cache_hit, **others)

    settings.listener = listen
    try:
        yield
    finally:
        settings.listener = outer


def _accelerator() -> str:
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found else "cpu"
