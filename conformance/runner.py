"""Run an op's cases on backends and compare each output with the oracle."""

import time
import traceback
from collections.abc import Callable, Sequence

from polyfuse.configs import Profile
from polyfuse.configs import profile as load_profile
from polyfuse.conformance.case import Case
from polyfuse.conformance.cases import all_cases, cases
from polyfuse.conformance.report import Report, Result, device_name
from polyfuse.conformance.trial import Trial
from polyfuse.dispatch import Backend, registry
from polyfuse.spec import OPS, BackendError

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
    total = report.planned = sum(len(c) for c in wanted.values()) * len(chosen)
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
                core = case.name in OPS[op].core
                report.results.append(Result(op, backend.name, case.name, status, round(seconds, 5), detail, core=core))
                if on_result:
                    on_result(report, total)
    report.finish()
    return report


def selected(op: str, profile: str, settings: Profile) -> list[tuple[Case, str]]:
    """Every case of an op, with why the profile does not run it or an empty text."""
    left_out = f"the profile {profile} runs one in {settings.sample} of the op's own cases"
    own = len(cases(op))
    chosen = all_cases(op) if settings.models else cases(op)
    return [(case, left_out if number < own and number % settings.sample else "") for number, case in enumerate(chosen)]


def _all_backends() -> list[Backend]:
    found = []
    for name in registry().names():
        try:
            found.append(registry().get(name))
        except BackendError:
            continue  # `polyfuse info` shows it with its traceback
    return found
