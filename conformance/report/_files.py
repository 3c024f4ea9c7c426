"""The files of a report. A reader never sees half a file: each is written beside its place and then moved there."""

import json
import os
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

from polyfuse.conformance.report._junit import junit

if TYPE_CHECKING:
    from polyfuse.conformance.report import Report


def write(report: "Report", folder: Path) -> list[Path]:
    """Write `conformance.json` and `junit.xml`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "conformance.json": json.dumps(report.as_dict(), indent=1) + "\n",
        "junit.xml": ET.tostring(junit(report), encoding="unicode", xml_declaration=True) + "\n",
    }
    return [replace(folder / name, text) for name, text in texts.items()]


def replace(path: Path, text: str) -> Path:
    """Make the text the file's content, all of it at once."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
    return path
