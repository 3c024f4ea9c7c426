"""A pytest plugin: every conformance case of one backend as a test of its own.

    pytest --polyfuse-backend mychip

A test that takes the fixture `polyfuse_case` runs once for each case, under an id of op and case:

    def test_conformance(polyfuse_case):
        polyfuse_case.check()

Without `--polyfuse-backend` such a test is skipped and nothing of polyfuse is imported.
"""

from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from polyfuse.configs import Profile
    from polyfuse.conformance import Case


@dataclass(frozen=True)
class ConformanceCase:
    """One conformance case of an op, to be run on a backend. `left_out`: why the profile does not run it, or empty."""

    op: str
    case: "Case"
    backend: str
    device: str
    limits: "Profile"
    left_out: str

    def check(self) -> None:
        """Run the case: skips it with the reason why it does not run, or fails with what is wrong with the result.

        What the backend raises goes through.
        """
        __tracebackhide__ = True
        if self.left_out:
            pytest.skip(self.left_out)
        from polyfuse.conformance import Trial
        from polyfuse.dispatch import registry

        backend = registry().get(self.backend)
        status, detail = Trial(self.op, self.case, self.limits.seed).on(backend, self.device, self.limits)
        if status == "skipped":
            pytest.skip(detail)
        if status == "waived":
            pytest.xfail(detail)
        if status == "failed":
            pytest.fail(detail, pytrace=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, all named `--polyfuse-...`."""
    group = parser.getgroup("polyfuse", "conformance of a polyfuse backend")
    group.addoption("--polyfuse-backend", metavar="NAME", help="The backend under test.")
    group.addoption(
        "--polyfuse-profile",
        metavar="PROFILE",
        default="quick",
        help="quick (the default here; that of `polyfuse conformance` is standard), standard or full.",
    )
    group.addoption("--polyfuse-device", metavar="DEVICE", help="cpu, cuda, ...; the accelerator if there is one.")
    group.addoption(
        "--polyfuse-op", metavar="OP", action="append", default=[], help="An op; repeat for several. Default: all."
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse an unknown backend, profile, op or device before anything is collected."""
    name = config.option.polyfuse_backend
    if name is None:
        return
    from polyfuse.configs import profile
    from polyfuse.dispatch import check_device, registry
    from polyfuse.spec import BackendError, SpecError, canonical

    try:
        family = registry().get(name).family
        profile(config.option.polyfuse_profile)
        config.option.polyfuse_op = [canonical(op) for op in config.option.polyfuse_op]
        if config.option.polyfuse_device is not None:
            check_device("--polyfuse-device", config.option.polyfuse_device, [family])
    except (BackendError, SpecError) as error:
        raise pytest.UsageError(f"polyfuse: {error}") from error


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
    from polyfuse.configs import profile
    from polyfuse.conformance.runner import selected
    from polyfuse.dispatch import registry
    from polyfuse.spec import OPS

    name = config.option.polyfuse_profile
    limits = profile(name)
    backend = registry().get(config.option.polyfuse_backend)
    device = "cpu" if backend.family == "numpy" else config.option.polyfuse_device or default_device()
    return [
        ConformanceCase(op, case, backend.name, device, limits, left_out)
        for op in dict.fromkeys(config.option.polyfuse_op or OPS)
        for case, left_out in selected(op, name, limits)
    ]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note the op of a conformance case in its report, which crosses processes."""
    report = yield
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("polyfuse_case") if callspec else None
    if isinstance(case, ConformanceCase):
        report.__dict__["polyfuse_op"] = case.op
    return report


def pytest_terminal_summary(terminalreporter: "pytest.TerminalReporter", config: pytest.Config) -> None:
    """Say what became of each op's cases and how many ops are conformant; pytest takes a run of skips for a success."""
    found: dict[str, Counter[str]] = {}
    for status, reports in terminalreporter.stats.items():
        for report in reports:
            op = getattr(report, "polyfuse_op", None)
            if op and status:
                found.setdefault(op, Counter())[status] += 1
    if not found:
        return
    from polyfuse.dispatch import registry
    from polyfuse.spec import OPS, BackendError

    name = config.option.polyfuse_backend
    terminalreporter.section(f"polyfuse conformance, profile {config.option.polyfuse_profile}")
    conformant = 0
    for op in filter(found.__contains__, OPS):
        counts, reason = found[op], ""
        if not counts["passed"]:
            try:
                missing = registry().get(name).missing(op)
                reason = f": {missing[1]}" if missing else ""
            except BackendError as error:
                reason = f": {error}"
        terminalreporter.line(f"{op}: " + ", ".join(f"{counts[s]} {s}" for s in sorted(counts)) + reason)
        conformant += bool(counts["passed"]) and not counts["failed"] + counts["error"]
    terminalreporter.line(f"{name}: {conformant} of {len(found)} ops conformant")
