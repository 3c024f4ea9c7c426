"""A file of committed results as it is read and shown: on the page, and in figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyfuse.conformance.report import read as read_report
from polyfuse.spec import fail

NAMED_VERSIONS = {
    "torch": "PyTorch",
    "triton": "Triton",
    "jax": "JAX",
    "transformers": "Transformers",
    "flash-linear-attention": "FLA",
    "flash-qla": "FlashQLA",
    "causal-conv1d": "causal-conv1d",
}

Result = Mapping[str, Any]


def named_versions(data: Result) -> list[str]:
    """The versions that a result was made with, each after the name that a reader knows."""
    return [f"{title} {data['versions'][key]}" for key, title in NAMED_VERSIONS.items() if key in data["versions"]]


def read(path: Path) -> Result:
    """One file of results. Raises `SpecError` if it does not say how it was made."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "schema" in data:
        report = read_report(path)
        by = "; ".join(report.command.splitlines())
        data["made"] = {"by": by, "commit": report.commit, "date": report.started.partition("T")[0]}
    made = data.get("made", {})
    missing = [key for key in ("by", "commit", "date") if not made.get(key)]
    if missing:
        fail("page", f"{path.name}: made", "the keys by, commit and date", f"none of {', '.join(missing)}")
    return data


def short(value: float | None) -> str:
    """A number with the digits that count, or a dash for none."""
    if value is None:
        return "-"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 or value == 0 else f"{value:.1g}"


def bytes_us(row: Result, ceiling_gb_s: float) -> float:
    """The time that the bytes of a call need at the stream speed of the run."""
    return float(row["device_us"] * row["gigabytes_per_s"] / ceiling_gb_s)
