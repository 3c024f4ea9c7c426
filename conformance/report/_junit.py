"""A report as JUnit's XML, which CI systems read."""

import xml.etree.ElementTree as ET
from collections import Counter
from typing import TYPE_CHECKING

from polyfuse.conformance.report._result import Result
from polyfuse.conformance.report._text import number, printable

if TYPE_CHECKING:
    from polyfuse.conformance.report._report import Report


def junit(report: "Report") -> str:
    """The report as one test suite.

    A wrong result is a failure, a case that ended without results an error, and a waived one is skipped. A run that is
    not complete has one more test case, an error, as the suite would otherwise look like a success.
    """
    cases = [_case(r) for r in report.results] + ([] if report.complete else [_incomplete(report)])
    tags = Counter(child.tag for case in cases for child in case)
    root = ET.Element(
        "testsuite",
        name="polyfuse conformance",
        tests=str(len(cases)),
        failures=str(tags["failure"]),
        errors=str(tags["error"]),
        skipped=str(tags["skipped"]),
        time=f"{sum(r.seconds for r in report.results):.3f}",
        timestamp=report.started.removesuffix("Z"),
    )
    properties = ET.SubElement(root, "properties")
    for name, value in _facts(report).items():
        ET.SubElement(properties, "property", name=printable(name), value=printable(value))
    root.extend(cases)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(result: Result) -> ET.Element:
    attributes = {"classname": f"{result.op}.{result.backend}", "name": result.case, "time": f"{result.seconds:.4f}"}
    case = ET.Element("testcase", {key: printable(value) for key, value in attributes.items()})
    if result.status == "passed":
        return case
    detail = printable(result.detail)
    first = detail.strip().partition("\n")[0]
    if result.status != "failed":
        ET.SubElement(case, "skipped", message=first if result.status == "skipped" else f"waived: {first}")
        return case
    tag = "error" if result.ending else "failure"
    problem = ET.SubElement(case, tag, message=first, type=result.ending or ",".join(result.checks) or "conformance")
    problem.text = detail
    return case


def _incomplete(report: "Report") -> ET.Element:
    case = ET.Element("testcase", classname="polyfuse.conformance", name="the run is complete", time="0")
    message = f"{report.state}: {len(report.results)} of {number(report.planned, 'planned result')}"
    ET.SubElement(case, "error", message=message, type="incomplete")
    return case


def _facts(report: "Report") -> dict[str, str]:
    """What the run was, as names and values."""
    facts = {
        "device": report.device,
        "level": report.level,
        "seed": str(report.seed),
        "state": report.state,
        "ok": str(report.ok).lower(),
        "cases": " ".join(report.filters.get("cases", [])),
        "command": report.command,
        "commit": report.commit or "",
        "started": report.started,
        "finished": report.finished,
    }
    facts |= {f"chip.{name}": value for name, value in report.chip.items()}
    facts |= report.versions
    facts |= {f"spec.{op}": str(version) for op, version in report.spec_versions.items()}
    for name, backend in report.backends.items():
        facts[f"backend.{name}"] = " ".join(filter(None, (backend.distribution, backend.version, backend.origin)))
    for (op, name), verdict in report.verdicts().items():
        facts[f"verdict.{op}.{name}"] = f"{verdict.status}: {verdict.why}; {verdict.claimed} of {verdict.asked} claimed"
    return {name: value for name, value in facts.items() if value}
