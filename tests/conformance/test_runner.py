"""The runner and its report: counts, reasons, crashes, exit status."""

import json
import xml.etree.ElementTree as ET

import pytest
import torch

import polyfuse
from polyfuse import SpecError, Unsupported
from polyfuse.configs import level, model_configs
from polyfuse.conformance import Trial, all_cases, cases, run
from polyfuse.conformance.cases import selected_for
from polyfuse.conformance.checks import checks
from polyfuse.dispatch import Backend, Implementation, registry
from polyfuse.spec import OPS, Capability

OP = "pos_embed_interpolate"


@pytest.fixture
def first_call_only(monkeypatch):
    """The checks that call a backend once, for runs of many cases."""
    found = {name: check for name, check in checks().items() if name in ("values", "inputs")}
    monkeypatch.setattr("polyfuse.conformance.trial.checks", lambda: found)


@pytest.fixture
def broken(monkeypatch):
    """A backend that crashes on bicubic, declines merge_size 3 at the call, refuses fp16 and is right otherwise."""
    right = registry().get("torch").load(OP).function

    def function(table, grid_thw, **attrs):
        if attrs["mode"] == "bicubic":
            raise ZeroDivisionError("deliberate")
        if attrs["merge_size"] == 3:
            raise Unsupported("merge_size=3")
        return right(table, grid_thw, **attrs)

    backend = Backend("broken", "torch", "polyfuse.torch_impl", implements={OP: OPS[OP].version})
    capability = Capability(dtypes={"table": ("float32", "bfloat16")})
    load = Backend.load
    mine = Implementation(function, capability)
    monkeypatch.setattr(Backend, "load", lambda self, op: mine if self.name == "broken" else load(self, op))
    registry().add(backend)
    yield
    polyfuse.refresh()


def test_each_outcome_is_counted_with_its_reason(broken, first_call_only, tmp_path, monkeypatch):
    standard = level("standard").model_copy(update={"max_elements": 2**17})  # most of the time goes to larger ones
    monkeypatch.setattr("polyfuse.conformance.tasks.load_level", lambda name: standard)
    seen = []
    report = run([OP], ["broken"], on_result=lambda report, latest: seen.append((latest.case, report.planned)))
    cases = all_cases(OP)
    by_case = {r.case: r for r in report.results}
    assert [c for c, _ in seen] == [c.name for c in cases]
    assert {total for _, total in seen} == {len(cases)}
    assert by_case["upsample-bilinear-corners"].status == "passed"
    crash = by_case["upsample-bicubic-corners"]
    assert crash.status == "failed"
    assert (crash.ending, crash.checks) == ("raised", ("values",))
    assert crash.detail.startswith("ZeroDivisionError: deliberate\n")
    assert 'raise ZeroDivisionError("deliberate")' in crash.detail
    assert by_case["merge_3-corners"].status == "failed"
    refused = by_case["dtypes-float16-out_default-base_none"]
    assert (refused.status, refused.detail) == (
        "skipped",
        "unsupported: table.dtype=float16: supports float32, bfloat16",
    )
    assert "more output elements than the 131072 that the level runs" in by_case["over_2_31"].detail
    assert not report.ok

    counts = report.counts()
    assert sum(counts.values()) == len(cases)
    files = report.write(tmp_path / "report")
    data = json.loads(files[0].read_text())
    assert data["counts"] == dict(counts)
    assert data["conformant"] == {"broken": []}
    assert data["versions"]["torch"] == torch.__version__
    suite = ET.parse(files[1]).getroot()
    assert int(suite.get("failures")) + int(suite.get("errors")) == counts["failed"]
    assert len(suite.findall("testcase/skipped")) == counts["skipped"]


def test_nothing_executed_is_not_a_success(monkeypatch):
    monkeypatch.setattr(Backend, "missing", lambda self, op: ("not_installed", "no such device"))
    report = run([OP], ["torch"], level="quick")
    assert set(report.counts()) == {"skipped"}
    assert report.conformant("torch") == []
    assert not report.ok


def test_a_backend_that_writes_to_its_input_fails(first_call_only, monkeypatch):
    right = registry().get("torch").load(OP)

    def function(table, grid_thw, **attrs):
        out = right.function(table, grid_thw, **attrs)
        table.mul_(2)
        return out

    monkeypatch.setattr(Backend, "load", lambda self, op: Implementation(function, right.capability))
    polyfuse.refresh()
    report = run([OP], ["torch"], only=["upsample-*"])
    polyfuse.refresh()
    wrote = {r.case: r.detail for r in report.results if r.status == "failed"}
    assert wrote["upsample-bilinear-corners"].startswith("table: the backend wrote to its input: ")


def test_a_sampled_case_that_is_left_out_is_reported():
    report = run([OP], ["numpy"], level="quick")
    skipped = [r.detail for r in report.results if r.status == "skipped"]
    left_out = [case.name for case, reason in selected_for(OP, "quick") if reason]
    assert 0 < len(left_out) < len(all_cases(OP)) - len(OPS[OP].core)
    assert sum("not among the cases of the level quick" in detail for detail in skipped) == len(left_out)
    assert report.ok


def test_a_filter_runs_its_cases_whatever_the_level_and_proves_nothing_of_the_op():
    core = OPS[OP].core
    report = run([OP], ["numpy"], level="quick", only=["upsample-bicubic-*", core[0]])
    ran = [r.case for r in report.results if r.reason != "left_out"]
    assert ran == [c.name for c in all_cases(OP) if c.name.startswith("upsample-bicubic-") or c.name == core[0]]
    assert {r.detail for r in report.results if r.reason == "left_out"} == {"not among the cases asked for"}
    assert report.ok
    verdict = report.verdict(OP, "numpy")
    assert (verdict.status, verdict.claimed) == ("partial", len(ran))
    assert verdict.why.startswith("a filter chose the cases; ")


def test_a_filter_that_matches_nothing_is_an_error():
    message = r"conformance: case: expected cases of pos_embed_interpolate, got \?nope, over_31; try over_2_31"
    with pytest.raises(SpecError, match=message):
        run([OP], ["numpy"], only=["upsample-*", "over_31", "?nope"])


def test_a_waiver_that_matches_no_case_fails_a_run_of_all_cases():
    other = next(op for op in OPS if op != OP)
    waivers = {
        f"{OP}/nope-*": "erratum 1",
        "pos_embed/over_2_31": "erratum 2",
        f"{OP}/over_2_31": "of use",
        "*/nope": "perhaps of use for another op",
        f"{other}/nope": "of another op",
    }
    backend = Backend("waiving", "numpy", "polyfuse.reference", implements={OP: OPS[OP].version}, waivers=waivers)
    registry().add(backend)
    try:
        report = run([OP], ["waiving", "numpy"], level="quick")
        stale = {(r.op, r.backend, r.case): r.detail for r in report.results if r.status == "failed"}
        assert stale == {
            (OP, "waiving", f"waiver {OP}/nope-*"): f"the waiver {OP}/nope-* (erratum 1) matches no case",
            ("pos_embed", "waiving", "waiver pos_embed/over_2_31"): (
                "the waiver pos_embed/over_2_31 (erratum 2) matches no case"
            ),
        }
        assert (report.ok, report.complete) == (False, True)
        assert run([OP], ["waiving"], level="quick", only=["over_2_31", "upsample-bicubic-*"]).counts()["failed"] == 0
    finally:
        registry.cache_clear()


def test_every_problem_of_a_case_is_told_but_only_of_right_values(monkeypatch):
    class Names:
        PROVES = "Nothing."

        def __init__(self, *problems):
            self.problems = problems

        def check(self, attempt):
            yield from self.problems

    found = {"values": checks()["values"], "one": Names("first", "second"), "two": Names(), "three": Names("third")}
    monkeypatch.setattr("polyfuse.conformance.trial.checks", lambda: found)
    case = next(c for c in cases(OP) if c.name == OPS[OP].core[0])
    result = Trial(OP, case, 0).result(registry().get("numpy"), "cpu", level("standard"))
    assert (result.status, result.checks, result.detail) == ("failed", ("one", "three"), "first\nsecond\nthird")
    assert result.margins["out"]["share"] < 1
    found["values"] = Names("wrong")
    result = Trial(OP, case, 0).result(registry().get("numpy"), "cpu", level("standard"))
    assert (result.checks, result.detail) == (("values",), "wrong")


def test_a_level_says_on_which_cases_a_check_runs(monkeypatch):
    ran = []

    class Noting:
        PROVES = "Nothing."

        def __init__(self, name):
            self.name = name

        def check(self, attempt):
            ran.append((self.name, attempt.case.name))
            return iter(())

    names = ("values", "everywhere", "sometimes", "seldom", "never")
    monkeypatch.setattr("polyfuse.conformance.trial.checks", lambda: {name: Noting(name) for name in names})
    monkeypatch.setattr("polyfuse.conformance.trial._margins", lambda attempt: {})
    scopes = {"values": "all", "everywhere": "all", "seldom": "core", "never": "none", "others": "sample"}
    some = level("quick").model_copy(update={"checks": scopes, "check_sample": 4})
    tried = [Trial(OP, case, 0) for case in cases(OP) if case.repeat == 1]
    for trial in tried:
        trial.result(registry().get("numpy"), "cpu", some)
    by_check = {name: {case for check, case in ran if check == name} for name in names}
    core = set(OPS[OP].core)
    assert by_check["everywhere"] == by_check["values"]
    assert by_check["seldom"] == core
    assert by_check["never"] == set()
    assert core < by_check["sometimes"] < by_check["everywhere"]
    assert 0.1 < len(by_check["sometimes"]) / len(by_check["everywhere"]) < 0.5


def test_levels_name_checks_that_there_are():
    for name in ("quick", "standard", "full"):
        assert level(name).checks.keys() <= {*checks(), "others"}, name
        assert level(name).cases_of("values") == "all"


def test_unknown_names_are_refused():
    with pytest.raises(SpecError, match="level: expected one of full, quick, standard, got 'slow'"):
        run(level="slow")
    with pytest.raises(polyfuse.BackendError, match=r"expected one of numpy.*got 'tritn'"):
        run(backends=["tritn"])


def test_a_waived_failure_is_reported_as_such_and_a_stale_waiver_fails(monkeypatch):
    def wrong_bias(x, w_qkvz, w_ba, *, w_z, w_a, bias_qkvz, bias_ba, strategy):
        if strategy == "merged":
            raise ZeroDivisionError("no merge unit")
        linear = torch.nn.functional.linear
        return linear(x, w_qkvz, bias_qkvz), linear(x, w_ba)

    waivers = {"gdn_in_proj/bias-*": "erratum 7", "gdn_in_proj/float32-merged": "erratum 8", "*/float16-auto": "old"}
    backend = Backend("waiving", "torch", "polyfuse.torch_impl", implements={"gdn_in_proj": 2}, waivers=waivers)
    monkeypatch.setattr(Backend, "load", lambda self, op: Implementation(wrong_bias, Capability()))
    registry().add(backend)
    try:
        trials = {case.name: Trial("gdn_in_proj", case, 0) for case in cases("gdn_in_proj")}
        status, detail = trials["bias-auto"].on(backend)
        assert status == "waived"
        assert detail.startswith("erratum 7 (ba: ")
        status, detail = trials["float32-merged"].on(backend)
        assert status == "waived"
        assert detail.startswith("erratum 8 (ZeroDivisionError: no merge unit\n")
        status, detail = trials["float16-merged"].on(backend)
        assert (status, str(trials["float16-merged"].error)) == ("failed", "no merge unit")
        assert trials["float16-auto"].on(backend) == ("failed", "stale waiver: old")
        assert trials["float32-auto"].on(backend) == ("passed", "")
    finally:
        registry.cache_clear()


@pytest.mark.parametrize("op", [op for op in OPS if any(op in model.ops for model in model_configs().values())])
def test_cases_cover_real_models(op):
    names = [c.name for c in all_cases(op)]
    assert any(n.startswith("qwen3") for n in names)
    assert len(set(names)) == len(names)
