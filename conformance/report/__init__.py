"""What a conformance run found: results, verdicts, and the files that one hands on."""

from polyfuse.conformance.report._facts import BackendFacts, backend_facts, chip, commit, device_name, versions
from polyfuse.conformance.report._report import SCHEMA, Report
from polyfuse.conformance.report._result import Margin, Result, Verdict

__all__ = [
    "SCHEMA",
    "BackendFacts",
    "Margin",
    "Report",
    "Result",
    "Verdict",
    "backend_facts",
    "chip",
    "commit",
    "device_name",
    "versions",
]
