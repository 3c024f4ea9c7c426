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
    BACKEND = Backend("mychip", "numpy", "mychip", implements={{"{OP}": {OPS[OP].version}}})
"""
KERNEL = """
    from polyfuse.reference.gdn_post_conv import gdn_post_conv as oracle
    from polyfuse.spec import Capability
    CAPABILITY = Capability(attrs={"l2norm": (True,)})
    def gdn_post_conv(conv_out, a, b, A_log, dt_bias, *, l2norm_eps, output_g_exp, **sizes):
        if len(conv_out) == 67:
            raise ZeroDivisionError("deliberate")
        return oracle(conv_out, a, b, A_log, dt_bias, l2norm_eps=l2norm_eps, **sizes)
"""
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
    environment["PYTHONPATH"] = str(folder)

    def run(*arguments, status=0):
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    run.folder = folder
    return run


def pytest_run(repository, *arguments, status=0):
    return repository("-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "test_all.py", *arguments, status=status)


def statuses(path):
    """Case to (status, detail) of a JUnit file of pytest."""
    found = {}
    for case in ET.parse(path).iter("testcase"):
        (status, detail), *_ = [(e.tag, e.get("message")) for e in case] or [("passed", "")]
        found[case.get("name")] = {"failure": "failed"}.get(status, status), detail
    return found


def test_ids_name_op_and_case_in_a_fixed_order(repository):
    options = ("--collect-only", "-q", "--polyfuse-backend", "mychip", "--polyfuse-op", OP)
    out = pytest_run(repository, *options, "--polyfuse-op", "gdn_in_proj")
    ids = [line for line in out.splitlines() if "::" in line]
    assert ids == [
        f"test_all.py::test_conformance[{op}-{case.name}]" for op in (OP, "gdn_in_proj") for case in all_cases(op)
    ]


def test_two_workers_find_what_a_conformance_run_finds(repository):
    chosen = ("--op", OP, "--backend", "mychip", "--profile", "quick")
    repository("-m", "polyfuse", "conformance", *chosen, "--report", "report", status=1)
    report = json.loads((repository.folder / "report/conformance.json").read_text())["results"]
    options = ("-n", "2", "--junitxml", "junit.xml", "--polyfuse-backend", "mychip", "--polyfuse-op", OP)
    pytest_run(repository, *options, status=1)
    found = statuses(repository.folder / "junit.xml")
    assert {name: status for name, (status, _) in found.items()} == {
        f"test_conformance[{OP}-{r['case']}]": r["status"] for r in report
    }
    assert {status for status, _ in found.values()} == {"passed", "failed", "skipped"}
    for r in report:
        _, detail = found[f"test_conformance[{OP}-{r['case']}]"]
        raised = "ZeroDivisionError: deliberate" in r["detail"]
        assert detail.removeprefix("Failed: ") == ("ZeroDivisionError: deliberate" if raised else r["detail"])


def test_what_a_person_reads(repository):
    some = f"{OP}-float32 or {OP}-bfloat16 or {OP}-rows_67 or gdn_in_proj-float32-auto"
    out = pytest_run(repository, "-rs", "--polyfuse-backend", "mychip", "-k", some, status=1)
    wrong, raised = (
        out.split(f"test_conformance[{OP}-{case}] ")[1] for case in ("float32-l2norm_True-g_exp_True", "rows_67")
    )
    assert wrong.splitlines()[1].startswith("g: 20 of 20 elements wrong; at [")
    assert 'raise ZeroDivisionError("deliberate")' in raised
    assert "the profile quick runs one in 3 of the op's own cases" in out
    assert "unsupported: l2norm=False: supports True" in out
    assert "does not implement gdn_in_proj" in out
    _, summary = out.split("= polyfuse conformance, profile quick =")
    lines = summary.splitlines()[1:4]
    assert lines[0].startswith(f"{OP}: 2 failed, ")
    assert lines[1] == "gdn_in_proj: 1 skipped: does not implement gdn_in_proj"
    assert lines[2] == "mychip: 0 of 2 ops conformant"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--polyfuse-backend", "nope"], "ERROR: polyfuse: backend: expected one of numpy, jax, pallas, torch, triton"),
        (["--polyfuse-profile", "nope"], "ERROR: polyfuse: profile: expected one of full, quick, standard, got 'nope'"),
        (["--polyfuse-device", "nope"], "ERROR: polyfuse: --polyfuse-device: expected a device of this machine"),
        (["--polyfuse-op", "nope"], "ERROR: polyfuse: op: expected one of pos_embed_interpolate"),
    ],
)
def test_an_unknown_name_stops_the_run_with_one_line(repository, options, message):
    out = pytest_run(repository, "--polyfuse-backend", "mychip", *options, status=4)
    assert message in out
    assert "Traceback" not in out


@pytest.mark.parametrize("options", [[], ["-n", "2"]])
def test_the_end_of_a_run_says_how_many_ops_are_conformant(repository, options):
    some = f"{OP}-float32-l2norm_True-g_exp_True or {OP}-float32-l2norm_False-g_exp_False or gdn_in_proj-float32"
    chosen = ("--polyfuse-backend", "numpy", "--polyfuse-profile", "standard", "-k", some)
    out = pytest_run(repository, *chosen, *options)
    _, summary = out.split("= polyfuse conformance, profile standard =")
    assert summary.splitlines()[1] == f"{OP}: 2 passed"
    assert summary.splitlines()[3] == "numpy: 2 of 2 ops conformant"


def test_without_a_backend_nothing_happens(repository):
    (repository.folder / "test_light.py").write_text(
        "import sys\n\ndef test_light():\n    assert not {'numpy', 'torch', 'yaml', 'jax'} & set(sys.modules)\n"
    )
    out = pytest_run(repository, "test_light.py", "-rs")
    assert "1 passed, 1 skipped" in out
    assert "no backend is named; try --polyfuse-backend NAME" in out
    assert "conformant" not in out
