"""Figures of the results of `polyfuse bench`, `bench encoder` and `bench model`. Drawing needs matplotlib.

`python -m polyfuse.bench.plots` draws those of the committed results into benchmarks/plots.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polyfuse.bench.plots.chart import Chart, made_on
from polyfuse.bench.plots.encoder import encoder_charts
from polyfuse.bench.plots.figure import draw
from polyfuse.bench.plots.labels import case_dtype
from polyfuse.bench.plots.model import model_charts
from polyfuse.bench.plots.ops import op_charts
from polyfuse.spec import fail

# By a key that only this kind of file has.
CHARTS: Mapping[str, Callable[[Mapping[str, Any]], list[Chart]]] = {
    "ceiling_gb_s": op_charts,
    "tower": encoder_charts,
    "strategies": model_charts,
}


def charts_of(data: Mapping[str, Any]) -> list[Chart]:
    """The charts of one file of results; none for a file of another kind."""
    return [chart for key, charts in CHARTS.items() if key in data for chart in charts(data)]


def origin_of(data: Mapping[str, Any]) -> str:
    """Device, dtype and versions of a file of results, as its figures name them."""
    found = {case_dtype(row["model"], row["op"], row["case"]) for row in data["rows"]} if "ceiling_gb_s" in data else ()
    return made_on(data, data.get("dtype") or ", ".join(sorted(filter(None, found))))


def plot(path: Path, folder: Path, kind: str = "svg") -> list[Path]:
    """Draw one file of results into a folder, a figure for each measurement in it; returns the figures' paths.

    Raises `SpecError` for a file that is not of `bench`, `bench encoder` or `bench model`, or has no results, and
    `ModuleNotFoundError` without matplotlib.
    """
    data = _read(path)
    charts = charts_of(data)
    if not charts:
        fail("plot", "path", "results of polyfuse bench, bench encoder or bench model", path.name)
    return [draw(chart, origin_of(data), folder / f"{chart.name(path.stem)}.{kind}") for chart in charts]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fail("plot", "path", "a JSON file", f"{path.name} ({error})")
    return data if isinstance(data, dict) else {}
