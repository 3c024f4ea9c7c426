"""A report as JUnit's XML, which CI systems read."""

import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyfuse.conformance.report import Report


def junit(report: "Report") -> ET.Element:
    """The report as one test suite."""
    counts = report.counts()
    root = ET.Element(
        "testsuite",
        name="polyfuse conformance",
        tests=str(len(report.results)),
        failures=str(counts["failed"]),
        skipped=str(counts["skipped"] + counts["waived"]),
    )
    properties = ET.SubElement(root, "properties")
    facts = {"device": report.device, "level": report.level, "seed": str(report.seed), **report.versions}
    for name, value in facts.items():
        ET.SubElement(properties, "property", name=name, value=value)
    for r in report.results:
        case = ET.SubElement(root, "testcase", classname=f"{r.op}.{r.backend}", name=r.case, time=f"{r.seconds:.4f}")
        if r.status != "passed":
            tag = "failure" if r.status == "failed" else "skipped"
            ET.SubElement(case, tag, message=r.detail)
    return root
