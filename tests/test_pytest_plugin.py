"""The pytest plugin, in a pytest of its own beside an installed backend that is right, wrong, limited and broken."""

import json
import os
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET

import pytest

from polyfuse.conformance import all_cases
from polyfuse.spec import OPS

OP = "gdn_post_conv"
BACKEND = f"""
    from polyfuse.dispatch import Backend
    import os
    waivers = {{"{OP}/nope": "erratum 1"}} if "STALE" in os.environ else {{}}
    BACKEND = Backend("mychip", "numpy", "mychip", implements={{"{OP}": {OPS[OP].version}}}, waivers=waivers)
"""
KERNEL = """
    import os, signal
    from polyfuse.reference.gdn_post_conv import gdn_post_conv as oracle
    from polyfuse.spec import Capability
    CAPABILITY = Capability(attrs={"l2norm": (True,)})
    def gdn_post_conv(conv_out, a, b, A_log, dt_bias, *, l2norm_eps, output_g_exp, **sizes):
        if len(conv_out) == 67:
            if "CRASH" in os.environ:
                os.kill(os.getpid(), signal.SIGSEGV)
            raise ZeroDivisionError("deliberate")
        return oracle(conv_out, a, b, A_log, dt_bias, l2norm_eps=l2norm_eps, **sizes)
"""
OPS_OF_TWO = ("--polyfuse-op", OP, "--polyfuse-op", "gdn_in_proj")
TEST = "def test_conformance(polyfuse_case):\n    polyfuse_case.check()\n"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Runs Python in a folder that holds a backend, as an installer lays it out, and one test."""
    folder = tmp_path_factory.mktemp("repository")
    info = folder / "mychip-1.0.dist-info"
    (folder / "mychip").mkdir()
    info.mkdir()
    (folder / "mychip/__init__.py").write_text(textwrap.dedent(BACKEND))
    (folder / f"mychip/{OP}.py").write_text(textwrap.dedent(KERNEL))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mychip\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[polyfuse.backends]\nmychip = mychip:BACKEND\n")
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (folder / "test_all.py").write_text(TEST)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("POLYFUSE_", "PYTEST_"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])

    def run(*arguments, status=0, **variables):
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=folder, env=environment | variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    run.folder = folder
    return run


def pytest_run(repository, *arguments, status=0, **variables):
    command = ("-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "test_all.py")
    return repository(*command, *arguments, status=status, **variables)


def summary(out):
    """The lines of the plugin at the end."""
    lines = out.split("= polyfuse conformance, level ")[1].splitlines()[1:]
    end = next(n for n, line in enumerate(lines) if line.endswith(" ops conformant"))
    return lines[: end + 1]


def statuses(path):
    """Case to (status, detail) of a JUnit file of pytest."""
    found = {}
    for case in ET.parse(path).iter("testcase"):
        (status, detail), *_ = [(e.tag, e.get("message")) for e in case] or [("passed", "")]
        found[case.get("name")] = {"failure": "failed", "error": "failed"}.get(status, status), detail
    return found


def test_ids_name_op_and_case_in_a_fixed_order(repository):
    options = ("--collect-only", "-q", "--polyfuse-backend", "mychip", "--polyfuse-op", OP)
    out = pytest_run(repository, *options, "--polyfuse-op", "gdn_in_proj")
    ids = [line for line in out.splitlines() if "::" in line]
    assert ids == [
        f"test_all.py::test_conformance[{op}-{case.name}]" for op in (OP, "gdn_in_proj") for case in all_cases(op)
    ]


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"CRASH": "1"},
        pytest.param({"STALE": "1"}, marks=pytest.mark.slow),
    ],
)
def test_two_workers_find_what_a_conformance_run_finds(repository, variables):
    chosen = ("--op", OP, "--backend", "mychip", "--level", "quick", "-j", "2")
    repository("-m", "polyfuse", "conformance", *chosen, "--report", "report", status=1, **variables)
    report = json.loads((repository.folder / "report/conformance.json").read_text())
    waivers = [r["detail"] for r in report["results"] if r["case"].startswith("waiver ")]
    results = {r["case"]: r for r in report["results"] if not r["case"].startswith("waiver ")}
    options = ("-n", "2", "--junitxml", "junit.xml", "--polyfuse-backend", "mychip", "--polyfuse-op", OP)
    out = pytest_run(repository, *options, status=1, **variables)
    found = statuses(repository.folder / "junit.xml")
    assert {name: status for name, (status, _) in found.items()} == {
        f"test_conformance[{OP}-{name}]": r["status"] for name, r in results.items()
    }
    assert {status for status, _ in found.values()} == {"passed", "failed", "skipped"}
    for name, r in results.items():
        _, detail = found[f"test_conformance[{OP}-{name}]"]
        if r["ending"] == "crashed":
            assert "crashed while running" in detail
        else:
            assert detail.removeprefix("Failed: ").splitlines()[:1] == r["detail"].splitlines()[:1]
    (verdict,) = report["verdicts"]
    counts = report["counts"]
    assert results["rows_67"]["ending"] == ("crashed" if "CRASH" in variables else "raised")
    assert len(waivers) == len(variables.keys() & {"STALE"})
    assert summary(out) == [
        f"{OP}: {counts['failed']} failed, {counts['passed']} passed, {counts['skipped']} skipped: failed, "
        + verdict["why"],
        *(f"{OP}: {line}" for line in waivers),
        "mychip: 0 of 1 ops conformant",
    ]


def test_what_a_person_reads(repository):
    some = f"{OP}-float32 or {OP}-bfloat16 or {OP}-rows_67 or gdn_in_proj-float32-auto"
    options = (*OPS_OF_TWO, "--polyfuse-backend", "mychip", "--polyfuse-level", "standard", "-k", some)
    out = pytest_run(repository, "-rs", *options, status=1)
    wrong, raised = (
        out.split(f"test_conformance[{OP}-{case}] ")[1] for case in ("float32-l2norm_True-g_exp_True", "rows_67")
    )
    assert wrong.splitlines()[1].startswith("g: 20 of 20 elements wrong; at [")
    assert 'raise ZeroDivisionError("deliberate")' in raised
    assert "unsupported: l2norm=False: supports True" in out
    assert "does not implement gdn_in_proj" in out
    lines = summary(out)
    assert lines[0].startswith(f"{OP}: 3 failed, 2 passed, ")
    assert lines[0].endswith(": failed, 3 cases failed")
    assert lines[1].endswith("skipped: not run, does not implement gdn_in_proj")
    assert lines[2] == "mychip: 0 of 2 ops conformant"


def test_a_run_in_which_nothing_ran_is_no_success(repository):
    out = pytest_run(repository, "--polyfuse-backend", "mychip", "--polyfuse-op", "gdn_in_proj", status=1)
    line, last = summary(out)
    assert line.endswith("skipped: not run, does not implement gdn_in_proj")
    assert last == "mychip: 0 of 1 ops conformant"


def test_a_test_that_fails_after_its_check_fails_the_case(repository):
    (repository.folder / "test_more.py").write_text(f"{TEST}    assert polyfuse_case.case.name != 'rows_0'\n")
    chosen = ("--polyfuse-backend", "numpy", "--polyfuse-op", OP, "--polyfuse-level", "standard", "-k", "rows_")
    out = pytest_run(repository, "-q", *chosen, "--deselect", "test_all.py", "test_more.py", status=1)
    assert summary(out)[0].endswith("failed, 1 case failed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--polyfuse-backend", "nope"], "ERROR: polyfuse: backend: expected one of numpy, jax, pallas, torch, triton"),
        (["--polyfuse-level", "nope"], "ERROR: polyfuse: level: expected one of full, quick, standard, got 'nope'"),
        (["--polyfuse-device", "nope"], "ERROR: polyfuse: --polyfuse-device: expected a device of this machine"),
        (["--polyfuse-op", "nope"], "ERROR: polyfuse: op: expected one of pos_embed_interpolate"),
    ],
)
def test_an_unknown_name_stops_the_run_with_one_line(repository, options, message):
    out = pytest_run(repository, "--polyfuse-backend", "mychip", *options, status=4)
    assert message in out
    assert "Traceback" not in out


def test_the_end_of_a_run_of_all_cases_says_what_is_conformant(repository):
    out = pytest_run(repository, "--polyfuse-backend", "numpy", "--polyfuse-op", OP)
    line, last = summary(out)
    assert line.endswith("skipped: conformant, all core cases and nothing failed")
    assert last == "numpy: 1 of 1 ops conformant"


@pytest.mark.parametrize("options", [[], pytest.param(["-n", "2"], marks=pytest.mark.slow)])
def test_a_part_of_the_cases_proves_a_part(repository, options):
    some = f"{OP}-float32-l2norm_True-g_exp_True or {OP}-float32-l2norm_False-g_exp_False or gdn_in_proj-float32"
    chosen = (*OPS_OF_TWO, "--polyfuse-backend", "numpy", "--polyfuse-level", "standard", "-k", some)
    out = pytest_run(repository, *chosen, *options)
    lines = summary(out)
    assert lines[0].startswith(f"{OP}: 2 passed, ")
    assert ": partial, a filter chose the cases; " in lines[0]
    assert " core cases left out" in lines[0]
    assert lines[2] == "numpy: 0 of 2 ops conformant"


def test_without_a_backend_nothing_happens(repository):
    (repository.folder / "test_light.py").write_text(
        "import sys\n\ndef test_light():\n    assert not {'numpy', 'torch', 'yaml', 'jax'} & set(sys.modules)\n"
    )
    out = pytest_run(repository, "test_light.py", "-rs")
    assert "1 passed, 1 skipped" in out
    assert "no backend is named; try --polyfuse-backend NAME" in out
    assert "conformant" not in out
