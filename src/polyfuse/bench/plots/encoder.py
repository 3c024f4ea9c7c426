"""Charts of `polyfuse bench encoder`."""

from collections.abc import Mapping
from typing import Any

from polyfuse.bench.plots.chart import Chart, Row, Rows, Section, Series
from polyfuse.bench.plots.labels import counted

MODELS = {"qwen3_vl": "Qwen3-VL"}
ROLES = {"untouched": "plain", "adapter": "other", "graph": "peer", "graph, compiled blocks": "ours"}
ROLES |= {"greedy, blocks not compiled": "other", "greedy": "peer", "optimal": "ours"}
KEYS = {"mean": "mean_ms", "median": "p50_ms", "99th percentile": "p99_ms", "mean of the host": "host_ms"}


def encoder_charts(data: Mapping[str, Any]) -> list[Chart]:
    """One chart: a request by its size, and the requests of a trace one by one."""
    sections = []
    if data["tower"]:
        sections.append(_tower(data["tower"]))
    for part in ("trace", "parallel"):
        if data[part]:
            sections.append(_trace(data[part]))
    title = f"{MODELS.get(data['model'], data['model'])} tower, {data['depth']} layers"
    return [Chart("", title, "latency of a request, ms", sections)] if sections else []


def _series(rows: Rows) -> list[Series]:
    names = list(dict.fromkeys(row["variant"] for row in rows))
    roles = [ROLES.get(name, "plain" if i == 0 else "ours") for i, name in enumerate(names)]
    return [Series(name, role) for name, role in zip(names, roles, strict=True)]


def _tower(rows: Rows) -> Section:
    series = _series(rows)
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        label = f"{row['rows']:,} patches, {counted(row['items'], 'image')}"
        found.setdefault(label, {})[row["variant"]] = row["device_ms"]
    lines = [Row(label, [times.get(s.name) for s in series]) for label, times in found.items()]
    return Section("One request, device time", series, lines)


def _trace(rows: Rows) -> Section:
    lines = [Row(name, [row[key] for row in rows]) for name, key in KEYS.items()]
    title = f"{rows[0]['requests']:,} requests of {rows[0]['items']:,} images, wall time"
    return Section(title, _series(rows), lines)
