"""The runner and its report: counts, reasons, crashes, exit status."""

import json
import xml.etree.ElementTree as ET

import pytest
import torch

import polyfuse
from polyfuse import SpecError, Unsupported
from polyfuse.configs import model_configs
from polyfuse.conformance import Trial, all_cases, cases, run
from polyfuse.dispatch import Backend, Implementation, registry
from polyfuse.spec import OPS, Capability

OP = "pos_embed_interpolate"


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


def test_each_outcome_is_counted_with_its_reason(broken, tmp_path):
    seen = []
    report = run(
        [OP], ["broken"], profile="standard", on_result=lambda r, total: seen.append((r.results[-1].case, total))
    )
    cases = all_cases(OP)
    by_case = {r.case: r for r in report.results}
    assert [c for c, _ in seen] == [c.name for c in cases]
    assert {total for _, total in seen} == {len(cases)}
    assert by_case["upsample-bilinear-corners"].status == "passed"
    crash = by_case["upsample-bicubic-corners"]
    assert crash.status == "failed"
    assert crash.detail.endswith("ZeroDivisionError: deliberate")
    assert by_case["merge_3-corners"].status == "failed"
    refused = by_case["dtypes-float16-out_default-base_none"]
    assert (refused.status, refused.detail) == (
        "skipped",
        "unsupported: table.dtype=float16: supports float32, bfloat16",
    )
    assert "more output elements than the 8000000 that the profile runs" in by_case["over_2_31"].detail
    assert not report.ok

    counts = report.counts()
    assert sum(counts.values()) == len(cases)
    files = report.write(tmp_path / "report")
    data = json.loads(files[0].read_text())
    assert data["counts"] == dict(counts)
    assert data["conformant"] == {"broken": []}
    assert data["versions"]["torch"] == torch.__version__
    suite = ET.parse(files[1]).getroot()
    assert suite.get("failures") == str(counts["failed"])
    assert len(suite.findall("testcase/skipped")) == counts["skipped"]


def test_nothing_executed_is_not_a_success(monkeypatch):
    monkeypatch.setattr(Backend, "missing", lambda self, op: ("not_installed", "no such device"))
    report = run([OP], ["torch"], profile="quick")
    assert set(report.counts()) == {"skipped"}
    assert report.conformant("torch") == []
    assert not report.ok


def test_a_backend_that_writes_to_its_input_fails(monkeypatch):
    right = registry().get("torch").load(OP)

    def function(table, grid_thw, **attrs):
        out = right.function(table, grid_thw, **attrs)
        table.mul_(2)
        return out

    monkeypatch.setattr(Backend, "load", lambda self, op: Implementation(function, right.capability))
    polyfuse.refresh()
    report = run([OP], ["torch"], profile="standard")
    polyfuse.refresh()
    wrote = {r.case: r.detail for r in report.results if r.status == "failed"}
    assert wrote["upsample-bilinear-corners"] == "table: the backend wrote to its input"


def test_a_sampled_case_that_is_left_out_is_reported():
    report = run([OP], ["numpy"], profile="quick")
    skipped = [r.detail for r in report.results if r.status == "skipped"]
    own = len(cases(OP))
    assert skipped.count("the profile quick runs one in 3 of the op's own cases") == own - len(range(0, own, 3))
    assert report.ok


def test_unknown_names_are_refused():
    with pytest.raises(SpecError, match="profile: expected one of full, quick, standard, got 'slow'"):
        run(profile="slow")
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
        assert trials["float32-merged"].on(backend) == ("waived", "erratum 8 (ZeroDivisionError: no merge unit)")
        with pytest.raises(ZeroDivisionError):
            trials["float16-merged"].on(backend)
        assert trials["float16-auto"].on(backend) == ("failed", "stale waiver: old")
        assert trials["float32-auto"].on(backend) == ("passed", "")
    finally:
        registry.cache_clear()


@pytest.mark.parametrize("op", [op for op in OPS if any(op in model.ops for model in model_configs().values())])
def test_cases_cover_real_models(op):
    names = [c.name for c in all_cases(op)]
    assert any(n.startswith("qwen3") for n in names)
    assert len(set(names)) == len(names)
