"""Reading a report's JSON file, also one from before the files had a schema number."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from polyfuse.conformance.report._report import SCHEMA, Report
from polyfuse.spec import OPS, fail

DERIVED = ("schema", "counts", "conformant", "verdicts", "ok")


def read(path: Path) -> Report:
    """The report of a JSON file. Raises `SpecError` if the file is none, or has a schema that is not known here."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail("report", str(path), "a report's JSON file", f"{type(error).__name__}: {error}")
    if not isinstance(data, dict):
        fail("report", str(path), "a report's JSON file", f"a {type(data).__name__}")
    schema = data.get("schema", 1)
    if schema == 1:
        data = _of_schema_1(data, path)
    elif schema != SCHEMA:
        fail("report", f"{path}: schema", f"1 or {SCHEMA}", repr(schema), "a newer polyfuse")
    data = {name: value for name, value in data.items() if name not in DERIVED}
    try:
        return TypeAdapter(Report).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "file"
        fail("report", f"{path}: {place}", "a report's JSON file", first["msg"])


def _of_schema_1(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A file without a schema number, as one of now. It has no more than a device, a profile, a seed and results."""
    missing = [name for name in ("device", "profile", "seed", "versions", "results") if name not in data]
    if missing:
        fail("report", str(path), "a report's JSON file", f"no {', '.join(missing)}")
    made = data.get("made", {})
    return {
        "device": data["device"],
        "level": data["profile"],
        "seed": data["seed"],
        "command": made.get("by", ""),
        "started": made.get("date", ""),
        "finished": made.get("date", ""),
        "state": "complete",
        "commit": made.get("commit"),
        "versions": data["versions"],
        "planned": len(data["results"]),
        "results": [{**result, **_reason_and_core(result)} for result in data["results"]],
    }


def _reason_and_core(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the older files say in the text of a skipped result only, and what the spec of now says of the case."""
    spec = OPS.get(result.get("op", ""))
    core = spec is not None and result.get("case") in spec.core
    if result.get("status") != "skipped":
        return {"core": core}
    detail = result.get("detail", "")
    beginnings = {"the profile ": "left_out", "more output elements": "too_large", "unsupported: ": "unclaimed"}
    reason = next((reason for beginning, reason in beginnings.items() if detail.startswith(beginning)), "unavailable")
    return {"reason": reason, "core": core}
