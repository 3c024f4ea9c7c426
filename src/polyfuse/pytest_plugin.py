"""A pytest plugin: every conformance case of one backend as a test of its own.

    pytest --polyfuse-backend mychip

A test that takes the fixture `polyfuse_case` runs once for each case, under an id of op and case:

    def test_conformance(polyfuse_case):
        polyfuse_case.check()

Without `--polyfuse-backend` such a test is skipped and nothing of polyfuse is imported.
"""

from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from polyfuse.configs import Level
    from polyfuse.conformance import Case, Report, Result


@dataclass(eq=False)
class ConformanceCase:
    """One conformance case of an op, to be run on a backend. `left_out`: why the level does not run it, or empty.

    `result` is what became of it, once `check` has run.
    """

    op: str
    case: "Case"
    backend: str
    device: str
    level: "Level"
    left_out: str
    result: "Result | None" = None

    def check(self) -> None:
        """Run the case: skips it with the reason why it does not run, or fails with all that is wrong.

        What the backend raises goes through, unless there is more to say.
        """
        __tracebackhide__ = True
        from polyfuse.conformance import Result, Trial
        from polyfuse.dispatch import registry

        trial = Trial(self.op, self.case, self.level.seed)
        if self.left_out:
            skipped = Result(self.op, self.backend, self.case.name, "skipped", detail=self.left_out, reason="left_out")
            self.result = replace(skipped, core=trial.core)
        else:
            self.result = trial.result(registry().get(self.backend), self.device, self.level)
        if self.result.status == "skipped":
            pytest.skip(self.result.detail)
        if self.result.status == "waived":
            pytest.xfail(self.result.detail)
        if trial.error is not None and len(self.result.checks) <= 1:
            raise trial.error
        if self.result.status == "failed":
            pytest.fail(self.result.detail, pytrace=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, all named `--polyfuse-...`."""
    group = parser.getgroup("polyfuse", "conformance of a polyfuse backend")
    group.addoption("--polyfuse-backend", metavar="NAME", help="The backend under test.")
    group.addoption(
        "--polyfuse-level",
        "--polyfuse-profile",
        metavar="LEVEL",
        default="quick",
        help="quick (the default here; that of `polyfuse conformance` is standard), standard or full.",
    )
    group.addoption("--polyfuse-device", metavar="DEVICE", help="cpu, cuda, ...; the accelerator if there is one.")
    group.addoption(
        "--polyfuse-op", metavar="OP", action="append", default=[], help="An op; repeat for several. Default: all."
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse an unknown backend, level, op or device before anything is collected."""
    name = config.option.polyfuse_backend
    if name is None:
        return
    from polyfuse.configs import level
    from polyfuse.dispatch import check_device, registry
    from polyfuse.spec import BackendError, SpecError, canonical

    try:
        family = registry().get(name).family
        level(config.option.polyfuse_level)
        config.option.polyfuse_op = [canonical(op) for op in config.option.polyfuse_op]
        if config.option.polyfuse_device is not None:
            check_device("--polyfuse-device", config.option.polyfuse_device, [family])
    except (BackendError, SpecError) as error:
        raise pytest.UsageError(f"polyfuse: {error}") from error
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Verdicts(config), "polyfuse_verdicts")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give `polyfuse_case` every case of every op."""
    if "polyfuse_case" not in metafunc.fixturenames:
        return
    if metafunc.config.option.polyfuse_backend is None:
        skip = pytest.mark.skip(reason="no backend is named; try --polyfuse-backend NAME")
        metafunc.parametrize("polyfuse_case", [pytest.param(None, marks=skip)], ids=["none"])
        return
    cases = _cases(metafunc.config)
    metafunc.parametrize("polyfuse_case", cases, ids=[f"{case.op}-{case.case.name}" for case in cases])


def _cases(config: pytest.Config) -> list[ConformanceCase]:
    """Every case, in the order and with the choice of a conformance run."""
    from polyfuse.cli._device import default_device
    from polyfuse.configs import level
    from polyfuse.conformance.runner import selected
    from polyfuse.dispatch import registry
    from polyfuse.spec import OPS

    name = config.option.polyfuse_level
    backend = registry().get(config.option.polyfuse_backend)
    device = "cpu" if backend.family == "numpy" else config.option.polyfuse_device or default_device()
    return [
        ConformanceCase(op, case, backend.name, device, level(name), left_out)
        for op in dict.fromkeys(config.option.polyfuse_op or OPS)
        for case, left_out in selected(op, name)
    ]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note a conformance case and its result in the test's report, which crosses processes."""
    report = yield
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("polyfuse_case") if callspec else None
    if isinstance(case, ConformanceCase):
        report.__dict__["polyfuse_case"] = [case.op, case.case.name]
        report.__dict__["polyfuse_result"] = asdict(case.result) if case.result else None
    return report


class Verdicts:
    """What the cases of a session prove, by the rules of `polyfuse conformance`; in the process that reports."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.results: dict[tuple[str, str], Result] = {}
        self.seen: set[str] = set()
        self.report: Report | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the result of a case; that of one whose test has failed is a failure, whatever the test did."""
        from polyfuse.conformance import Result

        crashed = report.when not in ("setup", "call", "teardown")  # pytest-xdist's report of what a worker died of
        key = self._crashed(report.nodeid) if crashed else tuple(getattr(report, "polyfuse_case", ()))
        if not key:
            return
        op, case = key
        self.seen.add(op)
        noted = getattr(report, "polyfuse_result", None)
        if noted and (report.when == "call" or report.failed):
            noted["checks"] = tuple(noted["checks"])
            self.results.setdefault((op, case), Result(**noted))
        if report.failed and getattr(self.results.get((op, case)), "status", "") != "failed":
            backend = self.config.option.polyfuse_backend
            failed = Result(op, backend, case, "failed", detail=report.longreprtext)
            self.results[op, case] = replace(failed, ending="crashed") if crashed else failed

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A run in which something failed, or nothing ran, or a waiver matched nothing, is no success."""
        if not self.seen or self.config.option.collectonly:
            return
        self.report = self._made(session.exitstatus == pytest.ExitCode.INTERRUPTED)
        if session.exitstatus == pytest.ExitCode.OK and not self.report.ok:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say of each op what became of its cases and what that proves."""
        if self.report is None:
            return
        name = self.config.option.polyfuse_backend
        terminalreporter.section(f"polyfuse conformance, level {self.report.level}")
        for (op, _), verdict in self.report.verdicts().items():
            counts, why = self.report.counts(op), verdict.why
            found = ", ".join(f"{counts[status]} {status}" for status in sorted(counts))
            reasons = {r.detail for r in self.report.results if r.op == op and r.reason != "left_out"}
            if verdict.status == "not run" and len(reasons) == 1:
                why = reasons.pop()
            terminalreporter.line(f"{op}: {found}: {verdict.status}, {why}")
        for result in self.report.results:
            if result.case.startswith("waiver "):
                terminalreporter.line(f"{result.op}: {result.detail}")
        ops = self.report.ops
        terminalreporter.line(f"{name}: {len(self.report.conformant(name))} of {len(ops)} ops conformant")

    def _crashed(self, node: str) -> tuple[str, ...]:
        """The op and the case of a test's id."""
        name = node.partition("[")[2].removesuffix("]")
        return next(((c.op, c.case.name) for c in _cases(self.config) if f"{c.op}-{c.case.name}" == name), ())

    def _made(self, interrupted: bool) -> "Report":
        """The report of the ops of which a test was seen. What pytest has not run was left out by its user."""
        from polyfuse.conformance import Report, Result, device_name
        from polyfuse.conformance.runner import unmatched_waivers
        from polyfuse.dispatch import registry
        from polyfuse.spec import OPS

        backend = registry().get(self.config.option.polyfuse_backend)
        cases = [case for case in _cases(self.config) if case.op in self.seen]
        report = Report(device_name(cases[0].device), self.config.option.polyfuse_level, cases[0].level.seed)
        for case in cases:
            found = self.results.get((case.op, case.case.name))
            if found is None and not interrupted:
                report.filters = {"cases": ["chosen by pytest"]}
                found = Result(case.op, backend.name, case.case.name, "skipped", reason="left_out")
            if found is not None:
                report.results.append(replace(found, core=case.case.name in OPS[case.op].core))
        if not report.filters and not interrupted:
            report.results += unmatched_waivers(backend, sorted(self.seen))
        report.planned = len(report.results)
        report.finish("interrupted" if interrupted else "complete")
        return report
