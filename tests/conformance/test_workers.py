"""Worker processes: what a case does to its process costs its own result and no other."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

import polyfuse
from polyfuse.conformance import cases, run, workers
from polyfuse.conformance.tasks import Task
from polyfuse.conformance.trial import EXACT
from polyfuse.conformance.worker import Setup
from polyfuse.dispatch import Backend, registry
from polyfuse.spec import OPS
from tests.conformance import hostile

NUMBERS = count()


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Writes a hostile package under a name of its own, whose modules are then new; gives the names."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def write(more=""):
        name = f"hostile{next(NUMBERS)}"
        hostile.write(tmp_path, name, more)
        return name

    yield write
    registry.cache_clear()
    polyfuse.refresh()


def outcomes(report):
    """The results without the times."""
    return [
        (r.op, r.backend, r.case, r.status, r.ending, r.checks, r.reason, r.margins, r.core) for r in report.results
    ]


def test_each_case_that_ends_its_process_fails_alone(plugin):
    report = run(
        [hostile.OP], ["hostile", "numpy"], only=hostile.ONLY, workers=2, plugins=[f"{plugin()}:BACKEND"],
        level="quick", time_limit=3, memory_limit=0.5,
    )  # fmt: skip
    assert (report.state, report.ok) == ("complete", False)
    assert len(report.results) == report.planned
    found = {(r.backend, r.case): r for r in report.results}
    assert {case: found["hostile", case].ending for case in hostile.ENDINGS} == hostile.ENDINGS
    details = {case: found["hostile", case].detail for case in hostile.ENDINGS}
    assert details["rows_1"].startswith("ended the process by SIGSEGV (Segmentation fault) during the check values\n")
    assert f"{hostile.OP}.py" in details["rows_1"]
    assert details["rows_2"].startswith("took longer than 3 s during the check values\n")
    assert f"{hostile.OP}.py" in details["rows_2"]
    expected = "ended the process with exit status 0 during the check values\n  this chip needs a rest"
    assert details["rows_67"] == expected
    assert details["dims_k24-v40-heads3"].startswith("ZeroDivisionError: deliberate\n")
    assert details["dims_k80-v96-heads4"].startswith("SystemExit: 0\n")
    assert "GiB of memory, of 0.5 allowed during the check values" in details["one_value_head"]
    assert {found["hostile", case].checks for case in hostile.ENDINGS} == {("values",)}
    assert found["hostile", "qkv_large"].status == "passed"
    assert {found["numpy", case].status for case in hostile.ONLY} == {"passed"}
    assert 3 <= found["hostile", "rows_2"].seconds < 9
    assert report.verdict(hostile.OP, "hostile").status == "failed"


def test_a_crash_can_be_waived(plugin):
    report = run([hostile.OP], ["hostile"], only=["rows_1"], workers=1, plugins=[f"{plugin()}:WAIVING"])
    (result,) = [r for r in report.results if r.reason != "left_out"]
    assert (result.status, result.ending) == ("waived", "crashed")
    assert result.detail.startswith("erratum 1 (ended the process by SIGSEGV")


def seldom(*beginnings):
    """The names of cases on which the level quick calls a backend once: all but the core ones."""
    names = (case.name for case in cases(hostile.OP) if case.name not in OPS[hostile.OP].core)
    return [name for name in names if name.startswith(beginnings)]


def test_the_same_report_from_any_number_of_workers(plugin):
    options = {"only": [*seldom("dims_", "rows_0", "qkv_"), "bias-auto"], "plugins": [f"{plugin()}:BACKEND"]}
    ops, names = [hostile.OP, "gdn_in_proj"], ["torch", "hostile", "numpy"]
    first, *others = (run(ops, names, level="quick", workers=workers, **options) for workers in (0, 1, 2))
    assert {r.status for r in first.results} == {"passed", "failed", "skipped"}
    assert any(r.margins for r in first.results)
    for other in others:
        assert outcomes(other) == outcomes(first)
        assert (other.planned, other.backends) == (first.planned, first.backends)
    assert first.backends["hostile"].claims.keys() == {hostile.OP, "gdn_in_proj"}


def test_cases_of_a_kind_go_to_the_worker_that_has_compiled_one():
    made = [Task(n, "gdn_post_conv", case, ("jax",), "cpu", "quick") for n, case in enumerate(cases("gdn_post_conv"))]
    zeros, nan, rows = (
        next(t for t in made if t.case.name == name) for name in ("qkv_zeros", "qkv_nan_some", "rows_67")
    )
    assert zeros.kind == nan.kind != rows.kind
    one, other = (SimpleNamespace(kinds={task.kind}) for task in (zeros, rows))
    some = workers.Workers(Setup((), ()), 2, workers.Limits(1, 1), "cpu")
    some._workers = {0: one, 1: other}
    assert some._next(one, deque([rows, nan])) is nan
    assert some._next(other, deque([nan, made[0]])) is made[0]
    assert some._next(other, deque([nan])) is nan


class Sham:
    """Stands in for a worker process: it is done with a task when the test says so."""

    def __init__(self, *_):
        self.task, self.idle, self.gone, self.filled, self.grown, self.kinds = None, True, False, False, 0.0, set()

    def give(self, task):
        self.task, self.idle, self.filled = task, False, self.filled or task.is_large

    def done(self):
        self.task, self.idle = None, True


def test_large_cases_come_first_and_have_a_device_to_themselves(monkeypatch):
    monkeypatch.setattr(workers, "_Worker", Sham)
    monkeypatch.setattr(workers, "accelerators", lambda device: 1)
    large, small = (next(c for c in cases("gdn_post_conv") if c.name == name) for name in ("over_2_31", "rows_67"))
    made = [Task(n, "gdn_post_conv", c, ("torch",), "cuda", "full") for n, c in enumerate([large, large, small, small])]
    assert [task.is_large for task in made] == [True, True, False, False]
    assert not replace(made[0], device="cpu").is_large
    some = workers.Workers(Setup((), ()), 2, workers.Limits(1, 1), "cuda")
    waiting = deque(made)
    for task in made[:2]:
        for _ in range(2):
            some._employ(waiting, "programs")
            assert {slot: worker.task for slot, worker in some._workers.items()} == {0: task}
        some._workers[0].done()
        assert some._holds_much(some._workers[0], waiting) == (task is made[1])
    del some._workers[0]
    some._employ(waiting, "programs")
    assert [worker.task for worker in some._workers.values()] == made[2:]
    assert not some._holds_much(some._workers[0], waiting)


def test_a_leak_does_not_accumulate(plugin):
    """Each case of 5 rows keeps 0.125 GiB, and says so if 6 have done so before it in the same process."""
    five = {case.name for case in cases(hostile.OP) if case.dims["L"] == 5}
    report = run(
        [hostile.OP], ["hostile"], only=[name for name in seldom("") if name in five], level="quick", workers=1,
        plugins=[f"{plugin()}:BACKEND"], memory_limit=0.5,
    )  # fmt: skip
    ran = [r for r in report.results if r.reason != "left_out"]
    assert len(ran) > 6
    assert [r.detail for r in ran if r.status != "passed"] == []


def test_workers_do_not_know_what_is_registered_in_this_process_alone():
    registry().add(Backend("mine", "torch", "polyfuse.torch_impl", implements={hostile.OP: 1}))
    try:
        with pytest.raises(polyfuse.BackendError, match=r"could not start.*got 'mine'; .* try workers=0 \(-j 0\)"):
            run([hostile.OP], ["mine"], only=["rows_0"], workers=1)
    finally:
        registry.cache_clear()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("if IN_WORKER: raise ImportError('no driver')", r"could not start: --plugin: expected .* \(no driver\)"),
        ("if IN_WORKER: os._exit(3)", "could not start: ended the process with exit status 3"),
        ("if IN_WORKER: time.sleep(99)", "could not start: took longer than 0.8 s"),
    ],
)
def test_a_worker_that_cannot_start_is_one_error(plugin, monkeypatch, more, message):
    monkeypatch.setattr(workers, "_START", 0.8 if "sleep" in more else 60.0)
    with pytest.raises(polyfuse.BackendError, match=message):
        run([hostile.OP], ["hostile"], only=["rows_0"], workers=2, plugins=[f"{plugin(more)}:BACKEND"])


def test_without_exact_results_no_backend_is_judged(plugin):
    more = """
        if IN_WORKER:
            from polyfuse.conformance import trial
            trial.oracle = lambda op: time.sleep(99)
    """
    report = run(
        [hostile.OP], ["numpy", "hostile"], only=["rows_0"], workers=1, plugins=[f"{plugin(more)}:BACKEND"],
        time_limit=0.5,
    )  # fmt: skip
    ran = [r for r in report.results if r.reason != "left_out"]
    assert [(r.backend, r.ending, r.checks) for r in ran] == [("numpy", "timed_out", ()), ("hostile", "timed_out", ())]
    assert all(r.detail.startswith(f"took longer than 0.5 s during {EXACT}") for r in ran)


# Python with an interrupt heeded, which it ignores where a shell has started the tests behind.
HEEDING = (
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
)


@pytest.mark.parametrize(("stop", "jobs"), [(signal.SIGINT, "2"), (signal.SIGTERM, "2"), (signal.SIGINT, "0")])
def test_a_run_that_is_stopped_leaves_its_results(plugin, tmp_path, stop, jobs):
    command = [*HEEDING, "-m", "polyfuse", "conformance", "--op", hostile.OP, "--backend", "hostile", "-j", jobs]
    cases = ("--case", "rows_2", "--case", "rows_0", "--plugin", f"{plugin()}:BACKEND", "--report", "report")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*command, *cases], env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "hangs").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # for the other case
    running = json.loads((tmp_path / "report/conformance.json").read_text())
    assert (running["state"], running["ok"]) == ("running", False)
    os.killpg(process.pid, stop)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130, out
    data = json.loads((tmp_path / "report/conformance.json").read_text())
    assert (data["state"], data["ok"]) == ("interrupted", False)
    ran = [(r["case"], r["status"]) for r in data["results"] if r["reason"] != "left_out"]
    assert ran == [("rows_0", "passed")]
    assert len(data["results"]) == data["planned"] - 1
    assert "interrupted" in (tmp_path / "report/junit.xml").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "hangs").read_text()), 0)


def test_several_gpus_are_one_for_each_worker(monkeypatch):
    monkeypatch.setattr(workers, "accelerators", lambda device: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = [workers._environment("cuda", slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert seen == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert [workers._environment("cuda", slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["5", "3"]
    assert workers._environment("cuda:1", 0, 3)["CUDA_VISIBLE_DEVICES"] == "5,3"
    assert workers.default_count("cuda") == 2


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(workers, "_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [workers._environment("cpu", 0, count)["OMP_NUM_THREADS"] for count in (1, 3, 16)] == ["8", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert workers._environment("cpu", 0, 3)["OMP_NUM_THREADS"] == "5"


def test_no_worker_reserves_memory_that_another_one_needs(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    assert workers._environment("cpu", 0, 2)["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")  # as who knows better says
    assert workers._environment("cpu", 0, 2)["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"


def test_workers_keep_the_memory_of_freed_arrays_unless_they_are_told_otherwise(monkeypatch):
    name, other = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"
    monkeypatch.setenv(name, "4096")
    monkeypatch.delenv(other, raising=False)
    found = workers._environment("cpu", 0, 2)
    assert (found[name], found[other]) == ("4096", "1073741824")


def test_what_jax_has_compiled_is_kept_for_the_other_workers(monkeypatch, tmp_path):
    pytest.importorskip("jax")
    folders = []
    compiled_once = workers._compiled_once
    monkeypatch.setattr(workers, "_compiled_once", lambda folder: folders.append(Path(folder)) or compiled_once(folder))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))  # as who wants it for the next run does
    report = run(["gdn_in_proj"], ["jax"], level="quick", only=["float16-auto"], workers=1)
    assert [r.status for r in report.results if r.reason != "left_out"] == ["passed"]
    assert any("gdn_in_proj" in path.name for path in tmp_path.iterdir())
    assert folders
    assert not folders[0].exists()
