"""Proof that every backend computes what the spec says: cases, inputs, checks, runner, reports."""

if __name__ != "polyfuse.conformance":
    raise ImportError(f"import polyfuse.conformance, not {__name__}")

from polyfuse.conformance.case import Case
from polyfuse.conformance.cases import all_cases, cases, model_cases, selected_for
from polyfuse.conformance.checks.values import compare
from polyfuse.conformance.inputs import make_inputs, place
from polyfuse.conformance.report import Report, Result, device_name, versions
from polyfuse.conformance.runner import run
from polyfuse.conformance.trial import Trial

__all__ = [
    "Case",
    "Report",
    "Result",
    "Trial",
    "all_cases",
    "cases",
    "compare",
    "device_name",
    "make_inputs",
    "model_cases",
    "place",
    "run",
    "selected_for",
    "versions",
]
