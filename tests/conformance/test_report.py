"""A report's verdicts: what its results prove, and what keeps them from proving more."""

import pytest

from polyfuse.conformance import Report, Result
from polyfuse.conformance.report import backend_facts
from polyfuse.dispatch import registry
from tests.conformance.reports import made, varied


@pytest.mark.parametrize(
    ("report", "status", "why"),
    [
        (made("ps"), "conformant", "all core cases and nothing failed"),
        (made("pw"), "conformant", "all core cases and nothing failed, 1 waived"),
        (made("pff"), "failed", "2 cases failed"),
        (made("ss"), "not run", "no case ran"),
        (made("wp"), "partial", "core case case0 waived"),
        (made("pp", core=False), "partial", "no core case among the results"),
        (made("pp", state="running"), "partial", "the run has not ended"),
        (made("pp", state="interrupted"), "partial", "the run was interrupted"),
        (made("pp", planned=3), "partial", "2 of 3 planned results are there"),
        (made("pp", filters={"cases": ["case*"]}), "partial", "a filter chose the cases"),
        (made("f", state="interrupted"), "failed", "1 case failed"),
    ],
)
def test_a_verdict_says_what_is_proven_and_why_not_more(report, status, why):
    verdict = report.verdict("a", "mine")
    assert (verdict.status, verdict.why) == (status, why)
    assert report.conformant("mine") == (["a"] if status == "conformant" else [])


def test_an_unclaimed_case_counts_against_the_share_and_a_case_left_out_does_not():
    report = made("pp")
    for case, reason in (("x", "unclaimed"), ("y", "unavailable"), ("z", "left_out"), ("v", "too_large")):
        report.results.append(Result("a", "mine", case, "skipped", reason=reason))
    verdict = report.verdict("a", "mine")
    assert (verdict.status, verdict.claimed, verdict.asked, verdict.share) == ("conformant", 2, 4, 0.5)


def test_a_core_case_that_is_not_claimed_makes_a_narrow_claim_partial():
    report = made("p")
    report.results.append(Result("a", "mine", "big", "skipped", reason="unclaimed", core=True))
    assert report.verdict("a", "mine").why == "core case big unclaimed"


def test_core_cases_that_a_filter_left_out_are_counted():
    report = made("p", filters={"cases": ["case*"]})
    report.results += [Result("a", "mine", case, "skipped", reason="left_out", core=True) for case in ("b", "c")]
    assert report.verdict("a", "mine").why == "a filter chose the cases; 2 core cases left out"


def test_a_verdict_on_what_has_no_results_is_not_run():
    assert made().verdict("b", "mine").status == "not run"


@pytest.mark.parametrize(
    ("report", "ok"),
    [
        (made("ps"), True),
        (made("pp", filters={"cases": ["case*"]}), True),
        (made("pf"), False),
        (made("ss"), False),
        (made("pp", state="running"), False),
        (made("pp", state="interrupted"), False),
        (made("pp", planned=3), False),
    ],
)
def test_a_run_is_ok_if_it_is_complete_and_something_passed_and_nothing_failed(report, ok):
    assert report.ok is ok
    assert report.as_dict()["ok"] is ok


def test_the_command_that_reruns_a_case_names_it_and_adds_the_plugin_again():
    report = varied(nasty="it's $HOME")
    assert report.rerun(report.results[1]) == (
        "polyfuse conformance --op a --backend mine --case 'case it'\"'\"'s $HOME' --level standard --device cuda"
        " --plugin mypackage:BACKEND"
    )


def test_a_backends_facts_name_its_distribution_and_its_claims():
    facts = backend_facts(registry().get("pallas"), ["gdn_in_proj"])
    assert (facts.family, facts.origin, facts.distribution) == ("jax", "built in", "polyfuse")
    assert facts.version == Report("cpu", "quick", 0).versions["polyfuse"]
    assert facts.claims["gdn_in_proj"].limits[-1] == "strategy in 'auto', 'fused'"
    assert facts.claims["gdn_in_proj"].missing is None
