"""Charts of `polyfuse bench model`."""

from collections.abc import Mapping
from typing import Any

from polyfuse.bench.baseline import compare, size_of
from polyfuse.bench.plots.chart import Chart, Row, Rows, Section, Series
from polyfuse.bench.plots.labels import counted

ROLES = {"untouched": "plain", "untouched + fla": "peer", "accelerated": "ours", "accelerated + fla": "ours, other"}
ROLES |= {"one pass": "ours", "compiled": "peer", "separate": "plain"}
ROLES |= {"sequential": "plain", "parallel": "peer", "merged": "ours", "fused": "other"}


def subject_of(data: Mapping[str, Any]) -> str:
    """Which model was measured, how many layers of it, and which of its weights are FP8."""
    subject = f"{data.get('sizes', data['model'])}, {data['layers']} layers"
    if data.get("fp8"):
        subject += ", FP8 MLPs and experts" if "moe" in data["model"] else ", FP8 MLPs"
    return subject


def model_charts(data: Mapping[str, Any]) -> list[Chart]:
    """Calls of the whole model, a layer by its parts, conv in one pass or two, and strategies of the projection."""
    subject = subject_of(data)
    phases = ("prefill", "decode")
    # Files from before the delta rule was one of the parts have no variants of a layer.
    layers = [row for row in data["layer"] if "variant" in row]
    found = {
        "whole": ("whole model", "time, ms", [_whole([r for r in data["rows"] if r["phase"] == p]) for p in phases]),
        "layer": ("one layer", "device time, µs", [_layer([r for r in layers if r["phase"] == p]) for p in phases]),
        "conv": ("from projection to delta rule", "device time, µs", [_conv(data["conv"])]),
        "in_proj": (
            "strategies of gdn_in_proj",
            "time of a call, µs",
            [_strategies([r for r in data["strategies"] if r["captured"] == c], c) for c in (False, True)],
        ),
    }
    charts = []
    for part, (what, unit, sections) in found.items():
        if shown := [section for section in sections if section.rows]:
            note = "A star marks what is chosen." if part == "in_proj" else ""
            charts.append(Chart(part, f"{subject}: {what}", unit, shown, note))
    return charts


def _series(rows: Rows) -> list[Series]:
    return [Series(name, ROLES.get(name, "other")) for name in dict.fromkeys(row["variant"] for row in rows)]


def _whole(rows: Rows) -> Section:
    """A line for each call."""
    series = _series(rows)
    lines = []
    for call in compare(rows):
        size = counted(call.call["tokens"] if call.call["phase"] == "prefill" else call.call["batch"], "token")
        if call.call["phase"] == "decode":
            size = f"{size.replace('token', 'sequence')}, {call.call['mode']}"
        lines.append(Row(size, [call.ms.get(s.name) for s in series]))
    if not rows or rows[0]["phase"] == "prefill":
        return Section("Prefill, wall time", series, lines)
    return Section(f"Decode after {rows[0]['context']:,} tokens; device time in a graph, else wall time", series, lines)


def _layer(rows: Rows) -> Section:
    """A line for each part of the largest call; what takes no time is left out."""
    if not rows:
        return Section("", (), ())
    largest = size_of(max(rows, key=lambda row: row["batch"] * row["tokens"]))
    shown = [row for row in rows if size_of(row) == largest]
    parts = list(dict.fromkeys(part for row in shown for part in row["parts"]))
    lines = [Row("all", [row["us"] for row in shown])]
    for part in parts:
        times = [row["parts"].get(part, 0) for row in shown]
        lines.append(Row(part, [us if us > 0 else None for us in times]))
    return Section(largest[:1].upper() + largest[1:], _series(shown), lines)


def _conv(rows: Rows) -> Section:
    series = _series(rows)
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["tokens"], {})[row["variant"]] = row["us"]
    lines = [Row(counted(n, "token"), [times.get(s.name) for s in series]) for n, times in found.items()]
    return Section("", series, lines)


def _strategies(rows: Rows, captured: bool) -> Section:
    names = list(rows[0]["us"]) if rows else []
    lines = [
        Row(counted(row["rows"], "row"), [row["us"][name] for name in names], names.index(row["chosen"]))
        for row in rows
    ]
    title = "Captured in a graph, device time" if captured else "Eager, wall time"
    return Section(title, [Series(name, ROLES.get(name, "other")) for name in names], lines)
