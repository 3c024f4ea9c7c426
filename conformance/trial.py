"""One case run on one backend: its inputs, its exact results, and the checks that give the verdict."""

import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from polyfuse.configs import Level
from polyfuse.configs import level as load_level
from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.case import Case
from polyfuse.conformance.checks import checks, values
from polyfuse.conformance.claims import check_refusal
from polyfuse.conformance.inputs import make_inputs
from polyfuse.conformance.other import Inputs, other_inputs
from polyfuse.conformance.report import Ending, Margin, Reason, Result
from polyfuse.dispatch import Backend, to_numpy
from polyfuse.reference import Exact, oracle
from polyfuse.spec import OPS, Call, Output, SpecError, bind, dtype_name

# What goes on at the moment, for whoever watches: one of these two, or the name of a check.
LOADING, EXACT = "loading the backend", "the exact results"
Note = Callable[[str], None]
CHEAP = ("values", "results", "inputs", "repeats")  # the checks of a case's first call
LARGE = 2**18  # elements of results


class Trial:
    """One case with its inputs and exact results, made once and run on every backend.

    Of the latest run `level` says how much the checks do, and `error` is what the backend raised, if it did.
    """

    def __init__(self, op: str, case: Case, seed: int) -> None:
        self.op, self.case, self.seed = op, case, seed
        self.core = case.name in OPS[op].core
        self.level = load_level("standard")
        self.error: BaseException | None = None
        self._made: tuple[dict[str, Any], Call] | None = None
        self._exact: dict[str, Exact] | None = None
        self._other: list[Inputs | None] = []

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

    def other(self) -> Inputs | None:
        """The case with other values in its arrays, made once; None where the spec refuses them."""
        if not self._other:
            try:
                self._other = [other_inputs(OPS[self.op], self.case, self.inputs()[0], self.seed + 1)]
            except SpecError:
                self._other = [None]
        return self._other[0]

    def check(self, result: Any, call: Call) -> str | None:
        """What is wrong with a result, or None."""
        return values.verdict(values.as_tuple(result), call, self.exact())

    def on(self, backend: Backend, device: str = "cpu", level: Level | None = None) -> tuple[str, str]:
        """(status, detail) of this case on one backend: by the checks of its first call, unless a level is given."""
        found = self.result(backend, device, level or _first_call_only())
        return found.status, found.detail

    def result(self, backend: Backend, device: str, level: Level, note: Note = lambda stage: None) -> Result:
        """What becomes of this case on one backend. `note` is called with what goes on, before it does.

        Whatever the backend raises is a failure, `SystemExit` included. The time that the exact results take is not
        part of the result's.
        """
        self.level, self.error = level, None
        self._uncounted = 0.0
        started = time.perf_counter()
        found = Result(self.op, backend.name, self.case.name, "passed", core=self.core)
        note(LOADING)
        try:
            attempt = self._attempt(found, backend, device, level)
            found = attempt if isinstance(attempt, Result) else self._checked(found, attempt, level, note)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            found = replace(found, status="failed", detail=self._described(error), ending=_ending(error))
        return waived(replace(found, seconds=round(time.perf_counter() - started - self._uncounted, 5)), backend)

    def _attempt(self, found: Result, backend: Backend, device: str, level: Level) -> Attempt | Result:
        """What the checks look at, or the result of a case that they do not look at."""
        missing = backend.missing(self.op)
        if missing:
            return _skipped(found, "unavailable", missing[1])
        capability = backend.load(self.op).capability
        too_large = self._too_large(device, device in capability.interpreted, level)
        if too_large:
            return _skipped(found, "too_large", too_large)
        interpreted = device in capability.interpreted
        repeats = 2 if interpreted else level.repeats
        attempt = Attempt(self, backend, device, capability, repeats)  # pyright: ignore[reportArgumentType], a file by two paths
        verdict = attempt.support
        if verdict.status == "unsupported":
            problem = check_refusal(attempt, verdict.reason)
            if problem:
                return replace(found, status="failed", detail=problem, checks=("refusal",))
            return _skipped(found, "unclaimed", f"unsupported: {verdict.reason}")
        if verdict.status != "usable":
            return _skipped(found, "unavailable", f"{verdict.status}: {verdict.reason}")
        return attempt

    def _checked(self, found: Result, attempt: Attempt, level: Level, note: Note) -> Result:
        """The verdict of the checks. The others run only if the values are right, as they take them to be."""
        started = time.perf_counter()
        note(EXACT)
        self.exact()
        self._uncounted = time.perf_counter() - started
        for name, check in checks().items():
            if not self._runs(name, level, attempt.slow):
                continue
            note(name)
            try:
                problems = list(check.check(attempt))
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                problems = [self._described(error)]
                found = replace(found, ending=found.ending or _ending(error))
            if problems:
                lines = "\n".join(filter(None, (found.detail, *problems)))
                found = replace(found, status="failed", detail=lines, checks=(*found.checks, name))
            if name == "values":
                found = replace(found, margins={} if found.ending else _margins(attempt))
                if problems:
                    break
        return found

    def _runs(self, check: str, level: Level, slow: bool) -> bool:
        """Whether a check of that name runs on this case; where calls are slow a sample stands for all."""
        cases = level.cases_of(check)
        if cases == "all" and check not in CHEAP and (slow or self._elements() > LARGE):
            cases = "sample"
        one_in = level.check_sample_slow if slow else level.check_sample
        sampled = crc32(f"{self.op}/{self.case.name}".encode()) % one_in == 0
        return cases == "all" or (cases != "none" and self.core) or (cases == "sample" and sampled)

    def _elements(self) -> int:
        """How many elements the results of one call have."""
        return sum(int(np.prod(output.shape)) for output in self.inputs()[1].results)

    def _described(self, error: BaseException) -> str:
        """What was raised, and behind it where."""
        self.error = self.error or error
        summary = "".join(traceback.format_exception_only(error)).strip()
        whole = "".join(traceback.format_exception(error, limit=-3)).strip()
        return f"{summary}\n{whole.removesuffix(summary).rstrip()}"

    def _too_large(self, device: str, interpreted: bool, level: Level) -> str | None:
        elements = self._elements()
        most = level.max_elements_interpreted if interpreted else level.max_elements
        if self.case.repeat > 1:
            elements *= self.case.repeat
            most = most if device == "cpu" else level.max_elements_repeated
        how = " interpreted" if interpreted else ""
        return f"more output elements than the {most} that the level runs{how}" if elements > most else None


def _first_call_only() -> Level:
    """The level standard with the checks alone that look at the first call, those beside the values on a sample."""
    cases = {"values": "all", "repeats": "all", "results": "sample", "inputs": "sample", "others": "none"}
    return load_level("standard").model_copy(update={"checks": cases})


def waived(found: Result, backend: Backend) -> Result:
    """The result, as the backend's waivers have it.

    A failure that the backend waives is `waived`, and a pass in spite of a waiver has failed: the waiver is stale.
    """
    reason = backend.waiver(found.op, found.case)
    if reason is None or found.status == "skipped":
        return found
    if found.status == "failed":
        return replace(found, status="waived", detail=f"{reason} ({found.detail})")
    return replace(found, status="failed", detail=f"stale waiver: {reason}")


def _skipped(found: Result, reason: Reason, detail: str) -> Result:
    return replace(found, status="skipped", reason=reason, detail=detail)


def _ending(error: BaseException) -> Ending:
    """How a case ended that raised an error: that of torch for a device's memory is known by its name."""
    if isinstance(error, SystemExit):
        return "exited"
    return "out_of_memory" if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" else "raised"


def _margins(attempt: Attempt) -> dict[str, Margin]:
    """How near each result came to its bound, if all have the shapes and dtypes that the op gives."""
    results = attempt.results(attempt.arrays, attempt.outputs)
    got = [to_numpy(result) for result in results]
    if len(got) != len(attempt.call.results) or not all(map(_is_like, got, attempt.call.results)):
        return {}
    found = values.margins(results, attempt.call, attempt.exact)
    return {name: Margin(share=margin.share, at=list(margin.at or ())) for name, margin in found.items()}


def _is_like(got: NDArray[Any], want: Output) -> bool:
    """Whether an array has the dtype and the shape of a result, as far as the call tells them."""
    sizes = zip(got.shape, want.shape, strict=False)
    same = len(got.shape) == len(want.shape) and all(n in (None, m) for m, n in sizes)
    return same and dtype_name(got.dtype) == want.dtype
