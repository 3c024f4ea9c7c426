"""Figures of the results of `polyfuse bench`, `bench encoder` and `bench model`. Needs matplotlib."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polyfuse.bench.plots.encoder import encoder_panels
from polyfuse.bench.plots.figure import STYLE, Panels, make_figure
from polyfuse.bench.plots.model import model_panels
from polyfuse.bench.plots.ops import op_panels
from polyfuse.spec import fail

# By a key that only this kind of file has.
DRAWINGS: Mapping[str, Callable[[Mapping[str, Any]], Panels]] = {
    "ceiling_gb_s": op_panels,
    "tower": encoder_panels,
    "strategies": model_panels,
}


def plot(path: Path, folder: Path, kind: str = "svg") -> Path:
    """Draw one file of results as `<its name>.svg` or `.png` in a folder; returns the figure's path.

    Raises `SpecError` for a file that is not of `bench`, `bench encoder` or `bench model`, or has no results, and
    `ModuleNotFoundError` without matplotlib.
    """
    from matplotlib import rc_context

    data = _read(path)
    panels = Panels()
    for key, panels_of in DRAWINGS.items():
        if key in data:
            panels = panels_of(data)
    if not panels.draws:
        fail("plot", "path", "results of polyfuse bench, bench encoder or bench model", path.name)
    with rc_context(STYLE):
        figure = make_figure(panels)
        versions = data["versions"]
        made_on = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions)
        figure.suptitle(f"{_subject(data)} on {data['device']} ({made_on})")
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{path.stem}.{kind}"
        figure.savefig(target, metadata={"Date": None} if kind == "svg" else None)
    return target


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fail("plot", "path", "a JSON file", f"{path.name} ({error})")
    return data if isinstance(data, dict) else {}


def _subject(data: Mapping[str, Any]) -> str:
    """The model that was measured, as the figure's title names it."""
    if "model" not in data:
        return "Ops"
    depth = data["layers"] if "layers" in data else data["depth"]
    return f"{data.get('sizes', data['model'])}, {depth} layers, {data['dtype']}"
