"""Panels of `polyfuse bench encoder`."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from polyfuse.bench.plots.figure import Panels, Rows, bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def encoder_panels(data: Mapping[str, Any]) -> Panels:
    """Latency of one request by its size, and of a trace's requests one by one."""
    panels = Panels()
    if data["tower"]:
        panels.draws.append(partial(_tower, rows=data["tower"]))
    for part in ("trace", "parallel"):
        if data[part]:
            panels.draws.append(partial(_trace, rows=data[part]))
    return panels


def _tower(axis: "Axes", rows: Rows) -> None:
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        axis.plot([row["rows"] for row in own], [row["ms"] for row in own], marker="o", label=variant)
    axis.set(title="One request", xlabel="rows of pixels", ylabel="latency (ms)", xscale="log", yscale="log")
    axis.legend()


def _trace(axis: "Axes", rows: Rows) -> None:
    keys = {"mean": "mean_ms", "median": "p50_ms", "99th percentile": "p99_ms", "host, mean": "host_ms"}
    series = {name: [row[key] for row in rows] for name, key in keys.items()}
    title = f"{rows[0]['requests']} requests, {rows[0]['items']} items"
    bars(axis, [row["variant"].replace(", ", ",\n") for row in rows], series, title, "latency (ms)")
