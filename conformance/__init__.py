"""Proof that every backend computes what the spec says: cases, inputs, checks, runner, reports."""

if __name__ != "polyfuse.conformance":
    raise ImportError(f"import polyfuse.conformance, not {__name__}")

from polyfuse.conformance.case import Case
from polyfuse.conformance.cases import all_cases, cases
from polyfuse.conformance.checks.values import compare
from polyfuse.conformance.inputs import make_inputs, place
from polyfuse.conformance.report import Report, Result
from polyfuse.conformance.runner import run

__all__ = ["Case", "Report", "Result", "all_cases", "cases", "compare", "make_inputs", "place", "run"]
