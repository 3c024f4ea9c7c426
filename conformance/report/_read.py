"""Reading a report's JSON file."""

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from polyfuse.conformance.report._report import SCHEMA, Report
from polyfuse.spec import fail

DERIVED = ("schema", "counts", "conformant", "verdicts", "ok")


def read(path: Path) -> Report:
    """The report of a JSON file. Raises `SpecError` if the file is none, or has a schema that is not known here."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail("report", str(path), "a report's JSON file", f"{type(error).__name__}: {error}")
    if not isinstance(data, dict):
        fail("report", str(path), "a report's JSON file", f"a {type(data).__name__}")
    schema = data.get("schema")
    if schema != SCHEMA:
        fail("report", f"{path}: schema", str(SCHEMA), repr(schema), "the polyfuse that wrote the file")
    data = {name: value for name, value in data.items() if name not in DERIVED}
    try:
        return TypeAdapter(Report).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "file"
        fail("report", f"{path}: {place}", "a report's JSON file", first["msg"])
