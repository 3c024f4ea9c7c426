"""Does conformance reject what is wrong? Every defect and every mutant of the ops is run, and none may survive."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import polyfuse
from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.cases import cases
from polyfuse.conformance.checks import checks
from polyfuse.conformance.defects import Defect, defects
from polyfuse.conformance.defects._planted import planted, restored
from polyfuse.conformance.ops import suite
from polyfuse.conformance.trial import Trial
from polyfuse.dispatch import Backend, registry
from polyfuse.spec import OPS, BackendError

SEED = 1
NAME = "planted"


def run(out: Callable[[str], object] = print, *, ops: Iterable[str] | None = None) -> bool:
    """Run every wrong implementation of the ops, of all by default, and say how many which check rejects.

    Returns whether none survives.
    """
    chosen = tuple(ops or OPS)
    started = time.perf_counter()
    survivors = [*_run_mutants(out, chosen), *_run_defects(out, chosen)]
    for survivor in survivors:
        out(f"survives: {survivor}")
    out(f"{'failed' if survivors else 'all rejected'}, {time.perf_counter() - started:.0f} s")
    return not survivors


def _run_mutants(out: Callable[[str], object], ops: tuple[str, ...]) -> Iterator[str]:
    """Wrong forms of the formulas, which the values have to show."""
    for op in ops:
        trials = [Trial(op, case, SEED) for case in cases(op) if case.repeat == 1]
        mutants = suite(op).MUTANTS
        surviving = [name for name, mutant in mutants.items() if not any(_differs(t, mutant) for t in trials)]
        out(f"{op}: values: {len(mutants) - len(surviving)} of {len(mutants)} wrong formulas rejected")
        yield from (f"{op}: {name}" for name in surviving)


def _differs(trial: Trial, mutant: Callable[..., object]) -> bool:
    values, call = trial.inputs()
    return trial.check(mutant(**values), call) is not None


def _run_defects(out: Callable[[str], object], ops: tuple[str, ...]) -> Iterator[str]:
    """Right backends with one defect, which the check of its kind has to show."""
    planned, rejected = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    trials: dict[object, Trial] = {}
    for defect in defects():
        if defect.op not in ops:
            continue
        reason = cannot_run(defect)
        if reason:
            out(f"{defect.op}: {defect.check}: {defect.name}: not run: {reason}")
            continue
        planned[defect.op, defect.check] += 1
        if defect.check in rejecting(defect, only=("values", defect.check), trials=trials):
            rejected[defect.op, defect.check] += 1
        else:
            yield f"{defect.op}: {defect.check}: {defect.name}"
    for (op, check), count in sorted(planned.items()):
        out(f"{op}: {check}: {rejected[op, check]} of {count} planted defects rejected")


def cannot_run(defect: Defect) -> str | None:
    """Why a defect cannot be run here, or None."""
    try:
        missing = registry().get(defect.backend).missing(defect.op)
    except BackendError as error:
        return str(error)
    return missing[1] if missing else None


def rejecting(
    defect: Defect, *, only: Iterable[str] | None = None, trials: dict[object, Trial] | None = None
) -> set[str]:
    """The checks that reject a defect, of all or of `only` some. Where the values are wrong the others do not run."""
    found: set[str] = set()
    try:
        backend = planted(NAME, defect.op, defect.backend, defect.make)
        for case in defect.chosen:
            key = defect.op, case.name, case.repeat
            trial = (trials if trials is not None else {}).setdefault(key, Trial(defect.op, case, SEED))
            with restored():
                found |= rejected_by(trial, backend, only)
            if found:
                break
    finally:
        polyfuse.refresh()
    return found


def rejected_by(trial: Trial, backend: Backend, only: Iterable[str] | None = None) -> set[str]:
    """The checks that find something wrong with a case on a backend; one that raises has found it too."""
    attempt = Attempt(trial, backend, "cpu", backend.load(trial.op).capability)
    found: set[str] = set()
    if attempt.support.status != "usable":
        return found
    for name, check in checks().items():
        if only is not None and name not in only:
            continue
        try:
            wrong = any(True for _ in check.check(attempt))
        except Exception:
            wrong = True
        if wrong:
            found.add(name)
            if name == "values":
                break
    return found
