"""Run the cases of ops on backends and compare each output with the oracle."""

from bisect import bisect
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from polyfuse.configs import level as load_level
from polyfuse.conformance.case import Case
from polyfuse.conformance.cases import all_cases, selected_for
from polyfuse.conformance.checks import checks
from polyfuse.conformance.report import Report, Result, backend_facts, chip, device_name
from polyfuse.conformance.tasks import Task, perform, register
from polyfuse.conformance.worker import Setup
from polyfuse.conformance.workers import Limits, Workers
from polyfuse.dispatch import Backend, Support, check_device, registry
from polyfuse.spec import OPS, fail

Progress = Callable[[Report, Result], None]


def run(
    ops: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    *,
    level: str = "standard",
    device: str = "cpu",
    only: Sequence[str] = (),
    workers: int = 0,
    plugins: Sequence[str] = (),
    time_limit: float | None = None,
    memory_limit: float | None = None,
    command: str = "",
    on_start: Callable[[Report], None] | None = None,
    on_result: Progress | None = None,
) -> Report:
    """Run conformance and return its report.

    `ops` and `backends` default to all; a backend that cannot run here at all has skipped results that say why.
    `device` is `"cpu"` or an accelerator as torch names it (`"cuda"`). `only` are names of cases, or patterns with
    wildcards: these cases run whether the level has them or not, and no others.

    The cases run in this process one after the other, unless `workers` says in how many processes they do. Those find
    the backends of installed packages and of `plugins` (`"module:OBJECT"`), which are registered here too, but none
    that was registered in this process alone. There a case may take `time_limit` seconds on a backend, and
    `memory_limit` GiB of memory; both default to the level's. A case that ends its process has failed, and the run
    goes on. The report has the results in the same order either way.

    `on_start(report)` is called before the first case and `on_result(report, result)` after each, with the report so
    far. `KeyboardInterrupt` ends the run and returns what there is, as a report that is `interrupted`. Raises
    `SpecError` or `BackendError` for an unknown op, backend, level or device, for a pattern that matches no case, and
    if a worker process cannot start.
    """
    settings = load_level(level)
    register(plugins)
    chosen = [registry().get(name) for name in backends] if backends else registry().usable()
    names = list(ops or OPS)
    check_device("conformance: device", device, [backend.family for backend in chosen])
    report = Report(
        device_name(device), level, settings.seed, settings.proves, command, {"cases": list(only)} if only else {},
        chip=chip(device),
        backends={b.name: backend_facts(b, ()) for b in chosen},
        spec_versions={op: OPS[op].version for op in names},
        checks={name: check.PROVES for name, check in checks().items() if settings.cases_of(name) != "none"},
    )  # fmt: skip
    found, tasks = _plan(names, chosen, device, level, only)
    report.planned = len(found) + sum(len(task.backends) for task in tasks)
    report.results += (result for _, result in found)
    if on_start:
        on_start(report)
    limits = Limits(time_limit or settings.time_limit, memory_limit or settings.memory_limit)
    setup = Setup(tuple(plugins), tuple(b.name for b in chosen))
    performed = Workers(setup, workers, limits, device).perform(tasks) if workers else _perform_here(tasks)
    numbers = [number for number, _ in found]
    try:
        with closing(performed):
            for number, each in performed:
                if isinstance(each, Support):
                    _add_claim(report, each)
                    continue
                at = bisect(numbers, number)
                numbers.insert(at, number)
                report.results.insert(at, each)
                if on_result:
                    on_result(report, each)
    except KeyboardInterrupt:
        report.finish("interrupted")
    else:
        report.finish()
    return report


def selected(op: str, level: str, only: Sequence[str] = ()) -> list[tuple[Case, str]]:
    """Every case of an op, with why a run does not run it or an empty text.

    The level says so, or `only`, patterns of which one has to match the case's name.
    """
    if only:
        return [(case, "" if _matches(case.name, only) else "not among the cases asked for") for case in all_cases(op)]
    return selected_for(op, level)


def unmatched_waivers(backend: Backend, ops: Sequence[str]) -> list[Result]:
    """A failed result for each waiver of a backend that matches no case: nobody sees that it is of no use.

    Only those that could match a case of another op than `ops` are left alone.
    """
    found = []
    for pattern, reason in backend.waivers.items():
        meant = [op for op in OPS if fnmatchcase(op, pattern.partition("/")[0])]
        names = (f"{op}/{case.name}" for op in meant if op in ops for case in all_cases(op))
        if set(meant) <= set(ops) and not any(fnmatchcase(name, pattern) for name in names):
            op = meant[0] if meant else pattern.partition("/")[0]
            detail = f"the waiver {pattern} ({reason}) matches no case"
            found.append(Result(op, backend.name, f"waiver {pattern}", "failed", detail=detail))
    return found


def _plan(
    ops: Sequence[str], backends: Sequence[Backend], device: str, level: str, only: Sequence[str]
) -> tuple[list[tuple[int, Result]], list[Task]]:
    """The results that need no run, each with its number in the report, and the tasks that give the others.

    Raises `SpecError` for a pattern in `only` that matches no case.
    """
    found: list[tuple[int, Result]] = []
    tasks: list[Task] = []
    names = tuple(backend.name for backend in backends)
    unused, number = set(only), 0
    known: set[str] = set()
    for op in ops:
        claims = True
        for case, left_out in selected(op, level, only):
            known.add(case.name)
            unused -= {pattern for pattern in unused if _matches(case.name, [pattern])}
            if left_out:
                blank = Result(
                    op, "", case.name, "skipped", 0.0, left_out, reason="left_out", core=case.name in OPS[op].core
                )
                found += [(number + i, replace(blank, backend=name)) for i, name in enumerate(names)]
            else:
                tasks.append(Task(number, op, case, names, device, level, claims))
                claims = False
            number += len(names)
    if unused:
        close = [name for pattern in sorted(unused) for name in get_close_matches(pattern, known)]
        fail("conformance", "case", f"cases of {', '.join(ops)}", ", ".join(sorted(unused)), " or ".join(close))
    if not only:
        stale = [result for backend in backends for result in unmatched_waivers(backend, ops)]
        found += enumerate(stale, number)
    return found, tasks


def _perform_here(tasks: Sequence[Task]) -> Generator[tuple[int, Support | Result]]:
    """What becomes of the tasks in this process, each result with its number in the run."""
    for task in tasks:
        number = task.first
        for found in perform(task):
            yield number, found
            number += isinstance(found, Result)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def _add_claim(report: Report, claim: Support) -> None:
    """Note what a backend claims of an op."""
    facts = report.backends[claim.backend]
    report.backends = {**report.backends, claim.backend: replace(facts, claims={**facts.claims, claim.op: claim})}
