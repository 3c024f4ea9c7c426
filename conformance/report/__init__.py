"""What a conformance run found: results, verdicts, and the files that one hands on."""

from polyfuse.conformance.report._diff import Difference, compare
from polyfuse.conformance.report._facts import BackendFacts, backend_facts, chip, commit, device_name, versions
from polyfuse.conformance.report._merge import merge
from polyfuse.conformance.report._read import read
from polyfuse.conformance.report._report import SCHEMA, Report
from polyfuse.conformance.report._result import Ending, Margin, Reason, Result, Verdict
from polyfuse.conformance.report._text import printable

__all__ = [
    "SCHEMA",
    "BackendFacts",
    "Difference",
    "Ending",
    "Margin",
    "Reason",
    "Report",
    "Result",
    "Verdict",
    "backend_facts",
    "chip",
    "commit",
    "compare",
    "device_name",
    "merge",
    "printable",
    "read",
    "versions",
]
