"""The files of a report. A reader never sees half a file: each is written beside its place and then moved there."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyfuse.conformance.report._junit import junit
from polyfuse.conformance.report._markdown import markdown
from polyfuse.conformance.report._page import page
from polyfuse.spec import fail

if TYPE_CHECKING:
    from polyfuse.conformance.report._report import Report

JSON, JUNIT = "conformance.json", "junit.xml"


def save(report: "Report", folder: Path) -> Path:
    """Write the JSON file; returns its path."""
    return write_file(report, folder / JSON)


def write(report: "Report", folder: Path) -> list[Path]:
    """Write every file; returns their paths."""
    return [write_file(report, folder / name) for name in (JSON, JUNIT, "conformance.md", "conformance.html")]


def write_file(report: "Report", path: Path) -> Path:
    """Write one file, whose suffix says what it is; returns its path. Raises `SpecError` for another suffix."""
    formats = {".json": as_json, ".xml": junit, ".md": markdown, ".html": page}
    if path.suffix not in formats:
        fail("report", str(path), f"a name that ends in {', '.join(formats)}", repr(path.suffix))
    path.parent.mkdir(parents=True, exist_ok=True)
    return replace(path, formats[path.suffix](report))


def replace(path: Path, text: str) -> Path:
    """Make the text the file's content, all of it at once."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def as_json(report: "Report") -> str:
    """The JSON text: a line for each result, so that two files compare line by line."""
    data = report.as_dict()
    results = [json.dumps(_finite(result), allow_nan=False, default=_plain) for result in data.pop("results")]
    head = json.dumps(data, indent=1, default=_plain)
    lines = ",\n  ".join(results)
    return head.removesuffix("\n}") + f',\n "results": [\n  {lines}\n ]\n}}\n'


def _finite(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result whose margins have no number that JSON does not have."""
    margins = {
        name: {**margin, "share": margin["share"] if _is_finite(margin["share"]) else None}
        for name, margin in result["margins"].items()
    }
    return {**result, "margins": margins}


def _is_finite(share: float | None) -> bool:
    return share is not None and math.isfinite(share)


def _plain(value: Any) -> Any:
    """A NumPy number as Python's. Raises `TypeError` for anything else."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not part of a report")
