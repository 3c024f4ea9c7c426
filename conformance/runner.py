"""Run an op's cases on backends and compare each output with the oracle."""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import polyfuse
from polyfuse.configs import Profile
from polyfuse.configs import profile as load_profile
from polyfuse.conformance.case import Case
from polyfuse.conformance.cases import all_cases, cases
from polyfuse.conformance.checks.values import compare
from polyfuse.conformance.inputs import make_inputs, place
from polyfuse.conformance.report import Report, Result
from polyfuse.dispatch import Backend, device_of, examine, family_of, registry, to_numpy
from polyfuse.reference import Exact, oracle
from polyfuse.spec import OPS, BackendError, Call, Unsupported, bind

Progress = Callable[[Report, int], None]


def run(
    ops: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    *,
    profile: str = "standard",
    device: str = "cpu",
    on_result: Progress | None = None,
) -> Report:
    """Run conformance and return its report.

    `ops` and `backends` default to all; a backend that cannot run here at all is one skipped result that says
    why. `device` is `"cpu"` or an accelerator as torch names it (`"cuda"`); `on_result(report, total)` is
    called after each case, with the report so far. Raises `SpecError` or `BackendError` for an unknown op, backend
    or profile.
    """
    settings = load_profile(profile)
    chosen = [registry().get(name) for name in backends] if backends else _all_backends()
    report = Report(device_name(device), profile, settings.seed)
    wanted = {op: selected(op, profile, settings) for op in ops or OPS}
    total = sum(len(c) for c in wanted.values()) * len(chosen)
    for op, its_cases in wanted.items():
        for case, left_out in its_cases:
            trial = Trial(op, case, settings.seed)
            for backend in chosen:
                place = "cpu" if backend.family == "numpy" else device
                started = time.perf_counter()
                try:
                    status, detail = ("skipped", left_out) if left_out else trial.on(backend, place, settings)
                except Exception:
                    status, detail = "failed", traceback.format_exc(limit=-3).strip()
                seconds = time.perf_counter() - started
                report.results.append(Result(op, backend.name, case.name, status, round(seconds, 5), detail))
                if on_result:
                    on_result(report, total)
    return report


def selected(op: str, profile: str, settings: Profile) -> list[tuple[Case, str]]:
    """Every case of an op, with why the profile does not run it or an empty text."""
    left_out = f"the profile {profile} runs one in {settings.sample} of the spec's cases"
    own = len(cases(op))
    chosen = all_cases(op) if settings.models else cases(op)
    return [(case, left_out if number < own and number % settings.sample else "") for number, case in enumerate(chosen)]


class Trial:
    """One case with its inputs and exact outputs, made once and run on every backend."""

    def __init__(self, op: str, case: Case, seed: int) -> None:
        self.op, self.case, self.seed = op, case, seed
        self._made: tuple[dict[str, Any], Call] | None = None
        self._exact: dict[str, Exact] | None = None

    def inputs(self) -> tuple[dict[str, Any], Call]:
        if self._made is None:
            values = make_inputs(OPS[self.op], self.case, self.seed)
            self._made = values, bind(OPS[self.op], values)
        return self._made

    def exact(self) -> dict[str, Exact]:
        if self._exact is None:
            self._exact = oracle(self.op).intervals(**self.inputs()[0])
        return self._exact

    def on(self, backend: Backend, device: str = "cpu", limits: Profile | None = None) -> tuple[str, str]:
        """(status, detail) of this case on one backend; the limits default to those of the standard profile.

        A failure that the backend waives is `waived`, and a pass in spite of a waiver has failed: the waiver is stale.
        """
        reason = backend.waiver(self.op, self.case.name)
        try:
            status, detail = self._verdict(backend, device, limits or load_profile("standard"))
        except Exception as error:
            if reason is None:
                raise
            status, detail = "failed", f"{type(error).__name__}: {error}"
        if reason is None or status == "skipped":
            return status, detail
        return ("waived", f"{reason} ({detail})") if status == "failed" else ("failed", f"stale waiver: {reason}")

    def _verdict(self, backend: Backend, device: str, limits: Profile) -> tuple[str, str]:
        missing = backend.missing(self.op)
        if missing:
            return "skipped", missing[1]
        interpreted = device in backend.load(self.op).capability.interpreted
        too_large = self._too_large(device, interpreted, limits)
        if too_large:
            return "skipped", too_large
        values, call = self.inputs()
        arrays = place(values, backend.family, device)
        first = next(v for v in arrays.values() if family_of(v))
        verdict, _ = examine(self.op, backend.name, call, backend.family, device_of(first, backend.family), False)
        if verdict.status == "unsupported":
            return self._refused(arrays, backend, verdict.reason)
        if verdict.status != "usable":
            return "skipped", f"{verdict.status}: {verdict.reason}"
        with np.errstate(all="ignore"):  # Triton's interpreter computes with NumPy
            result = getattr(polyfuse, self.op)(**arrays, backend=backend.name)
        problem = self.check(result, call)
        if problem is None and self.case.repeat > 1:
            problem = self._check_repeated(result, arrays, backend)
        return ("failed", problem) if problem else self._inputs_intact(values, arrays)

    def _refused(self, arrays: Mapping[str, Any], backend: Backend, reason: str) -> tuple[str, str]:
        """What a backend does not claim must be refused."""
        try:
            getattr(polyfuse, self.op)(**arrays, backend=backend.name)
        except Unsupported:
            return "skipped", f"unsupported: {reason}"
        return "failed", f"ran, though it does not claim to: {reason}"

    def _too_large(self, device: str, interpreted: bool, limits: Profile) -> str | None:
        _, call = self.inputs()
        elements = sum(int(np.prod(output.shape)) for output in call.outputs)
        most = limits.max_elements_interpreted if interpreted else limits.max_elements
        if self.case.repeat > 1:
            elements *= self.case.repeat
            most = most if device == "cpu" else limits.max_elements_repeated
        how = " interpreted" if interpreted else ""
        return f"more output elements than the {most} that the profile runs{how}" if elements > most else None

    def _check_repeated(self, result: Any, arrays: Mapping[str, Any], backend: Backend) -> str | None:
        """Run on repeated rows; every repetition must equal the first run's result, which the oracle has passed."""
        times, spec = self.case.repeat, OPS[self.op]
        grown = dict(arrays)
        for tensor in spec.tensors:
            value = arrays[tensor.name]
            if tensor.shape[0] == spec.rows and value is not None:
                grown[tensor.name] = value * times if isinstance(value, tuple) else _repeat(value, times)
        large = getattr(polyfuse, self.op)(**grown, backend=backend.name)
        outputs = self.inputs()[1].outputs
        for want, one, many in zip(outputs, _as_tuple(result), _as_tuple(large), strict=True):
            for i in range(times):
                if not _equal_bits(many[i * len(one) : (i + 1) * len(one)], one):
                    return f"{want.name}: repetition {i} of {times} differs from the first run"
        return None

    def check(self, result: Any, call: Call) -> str | None:
        """What is wrong with a result, or None."""
        outputs = _as_tuple(result)
        if len(outputs) != len(call.outputs):
            return f"expected {len(call.outputs)} outputs, got {len(outputs)}"
        for want, got in zip(call.outputs, outputs, strict=True):
            problem = compare(want.name, to_numpy(got), self.exact()[want.name], want.dtype)
            if problem:
                return problem
            if want.strides and family_of(got) == "torch" and got.stride() != want.strides:
                return f"{want.name}: expected strides {list(want.strides)}, got {list(got.stride())}"
        return None

    def _inputs_intact(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, str]:
        for name, value in before.items():
            if isinstance(value, np.ndarray):
                now = to_numpy(after[name]).astype(value.dtype, copy=False)
                if value.tobytes() != now.tobytes():
                    return "failed", f"{name}: the backend wrote to its input"
        return "passed", ""


def _as_tuple(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _repeat(value: Any, times: int) -> Any:
    """An array with its rows repeated as a whole, on its device."""
    if family_of(value) == "torch":
        return value.repeat(times, *([1] * (value.ndim - 1)))
    if family_of(value) == "numpy":
        return np.tile(value, (times, *([1] * (value.ndim - 1))))
    import jax.numpy as jnp

    return jnp.tile(value, (times, *([1] * (value.ndim - 1))))


def _equal_bits(one: Any, other: Any) -> bool:
    if family_of(one) == "torch" and one.element_size() == 1:
        import torch

        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return bool((one == other).all())


def _all_backends() -> list[Backend]:
    found = []
    for name in registry().names():
        try:
            found.append(registry().get(name))
        except BackendError:
            continue  # `polyfuse info` shows it with its traceback
    return found


def device_name(device: str) -> str:
    """The device's own name, for reports."""
    if device == "cpu":
        import platform

        return f"cpu ({platform.machine()})"
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device
