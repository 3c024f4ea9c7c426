"""One case run on one backend: its inputs, its exact results, and the checks that give the verdict."""

from typing import Any

import numpy as np

from polyfuse.configs import Profile
from polyfuse.configs import profile as load_profile
from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.case import Case
from polyfuse.conformance.checks import checks, values
from polyfuse.conformance.claims import check_refusal
from polyfuse.conformance.inputs import make_inputs
from polyfuse.dispatch import Backend, device_of, examine, family_of
from polyfuse.reference import Exact, oracle
from polyfuse.spec import OPS, Call, bind


class Trial:
    """One case with its inputs and exact results, made once and run on every backend."""

    def __init__(self, op: str, case: Case, seed: int) -> None:
        self.op, self.case, self.seed = op, case, seed
        self._made: tuple[dict[str, Any], Call] | None = None
        self._exact: dict[str, Exact] | None = None

    def inputs(self) -> tuple[dict[str, Any], Call]:
        """The NumPy inputs by parameter, and the validated call."""
        if self._made is None:
            made = make_inputs(OPS[self.op], self.case, self.seed)
            self._made = made, bind(OPS[self.op], made)
        return self._made

    def exact(self) -> dict[str, Exact]:
        """The oracle's interval of each result."""
        if self._exact is None:
            self._exact = oracle(self.op).intervals(**self.inputs()[0])
        return self._exact

    def check(self, result: Any, call: Call) -> str | None:
        """What is wrong with a result, or None."""
        return values.verdict(values.as_tuple(result), call, self.exact())

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
        attempt = Attempt(self, backend, device, backend.load(self.op).capability)
        first = next(v for v in attempt.arrays.values() if family_of(v))
        where = device_of(first, backend.family)
        verdict, _ = examine(self.op, backend.name, attempt.call, backend.family, where, False)
        if verdict.status == "unsupported":
            problem = check_refusal(attempt, verdict.reason)
            return ("failed", problem) if problem else ("skipped", f"unsupported: {verdict.reason}")
        if verdict.status != "usable":
            return "skipped", f"{verdict.status}: {verdict.reason}"
        for check in checks().values():
            problem = next(check.check(attempt), None)
            if problem:
                return "failed", problem
        return "passed", ""

    def _too_large(self, device: str, interpreted: bool, limits: Profile) -> str | None:
        _, call = self.inputs()
        elements = sum(int(np.prod(output.shape)) for output in call.results)
        most = limits.max_elements_interpreted if interpreted else limits.max_elements
        if self.case.repeat > 1:
            elements *= self.case.repeat
            most = most if device == "cpu" else limits.max_elements_repeated
        how = " interpreted" if interpreted else ""
        return f"more output elements than the {most} that the profile runs{how}" if elements > most else None
