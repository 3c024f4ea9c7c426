"""Figures of the results of `polyfuse bench`, `bench encoder` and `bench model`. Needs matplotlib."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyfuse.spec import fail

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, PANEL = 11.0, 3.6  # inches: of a figure, and the height of a panel
# Text stays text, and the same results give the same file.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "polyfuse",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
STYLE |= {"axes.axisbelow": True, "legend.fontsize": 8}

Draw = Callable[["Axes"], None]
Rows = Sequence[Mapping[str, Any]]


def plot(path: Path, folder: Path, kind: str = "svg") -> Path:
    """Draw one file of results as `<its name>.svg` or `.png` in a folder; returns the figure's path.

    Raises `SpecError` for a file that is not of `bench`, `bench encoder` or `bench model`, or has no results, and
    `ModuleNotFoundError` without matplotlib.
    """
    from matplotlib import rc_context

    data = _read(path)
    drawing = next((draw for key, draw in DRAWINGS.items() if key in data), None)
    panels, heights = drawing(data) if drawing else ([], [])
    if not panels:
        fail("plot", "path", "results of polyfuse bench, bench encoder or bench model", path.name)
    with rc_context(STYLE):
        figure = _figure(panels, heights)
        made_on = ", ".join(
            f"{name} {data['versions'][name]}" for name in ("torch", "triton") if name in data["versions"]
        )
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
    if "model" not in data:
        return "Ops"
    depth = data["layers"] if "layers" in data else data["depth"]
    return f"{data.get('sizes', data['model'])}, {depth} layers, {data['dtype']}"


def _figure(panels: Sequence[Draw], heights: Sequence[float]) -> "Figure":
    """Panels above one another if they have heights of their own, else in two columns."""
    from matplotlib.figure import Figure

    if heights:
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    else:
        columns = min(2, len(panels))
        lines = -(-len(panels) // columns)
        figure = Figure(figsize=(WIDTH, PANEL * lines + 0.5), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False)
    cells = list(axes.flat)
    for draw, axis in zip(panels, cells, strict=False):
        draw(axis)
    for axis in cells[len(panels) :]:
        axis.set_visible(False)
    return figure


def _bars(
    axis: "Axes", labels: Sequence[str], series: Mapping[str, Sequence[float | None]], title: str, unit: str
) -> None:
    """Groups of upright bars, a group for each label; None leaves a bar out."""
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        places = [place + (i - (len(series) - 1) / 2) * width for place in range(len(labels))]
        axis.bar(places, [0.0 if value is None else value for value in values], width, label=name)
    axis.set_xticks(range(len(labels)), labels)
    axis.set(title=title, ylabel=unit)
    axis.grid(visible=False, axis="x")
    axis.legend()


def _ops(data: Mapping[str, Any]) -> tuple[list[Draw], list[float]]:
    """A panel for each op: device time of each case, one bar for each backend."""
    rows: Rows = data["rows"]
    names = list(dict.fromkeys(row["backend"] for row in rows))
    panels: list[Draw] = []
    heights: list[float] = []
    for op in dict.fromkeys(row["op"] for row in rows):
        times: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["op"] == op:
                times.setdefault(f"{row['model']}, {row['case']}", {})[row["backend"]] = row["device_us"]

        def draw(axis: "Axes", op: str = op, times: Mapping[str, Mapping[str, float]] = times) -> None:
            width = 0.8 / len(names)
            for i, name in enumerate(names):
                found = [
                    (place + (i - (len(names) - 1) / 2) * width, case[name])
                    for place, case in enumerate(times.values())
                    if name in case
                ]
                axis.barh([place for place, _ in found], [us for _, us in found], width, label=name, color=f"C{i}")
            axis.set_yticks(range(len(times)), list(times))
            axis.invert_yaxis()
            axis.set(title=op, xlabel="device time per call (µs)", xscale="log")
            axis.grid(visible=False, axis="y")
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1))

        panels.append(draw)
        heights.append(1.1 + 0.42 * len(times))
    return panels, heights


def _encoder(data: Mapping[str, Any]) -> tuple[list[Draw], list[float]]:
    """Latency of one request by its size, and of a trace's requests one by one."""
    panels: list[Draw] = []
    if data["tower"]:
        panels.append(partial(_tower, rows=data["tower"]))
    for part in ("trace", "parallel"):
        if data[part]:
            panels.append(partial(_trace, rows=data[part]))
    return panels, []


def _tower(axis: "Axes", rows: Rows) -> None:
    for variant in dict.fromkeys(row["variant"] for row in rows):
        points = [(row["rows"], row["ms"]) for row in rows if row["variant"] == variant]
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=variant)
    axis.set(title="One request", xlabel="rows of pixels", ylabel="latency (ms)", xscale="log", yscale="log")
    axis.legend()


def _trace(axis: "Axes", rows: Rows) -> None:
    keys = {"mean": "mean_ms", "median": "p50_ms", "99th percentile": "p99_ms", "host, mean": "host_ms"}
    series = {name: [row[key] for row in rows] for name, key in keys.items()}
    title = f"{rows[0]['requests']} requests, {rows[0]['items']} items"
    _bars(axis, [row["variant"].replace(", ", ",\n") for row in rows], series, title, "latency (ms)")


def _model(data: Mapping[str, Any]) -> tuple[list[Draw], list[float]]:
    """Throughput, a layer by its parts, conv in one pass or two, and strategies of the projection."""
    panels: list[Draw] = []
    for phase in ("prefill", "decode"):
        if rows := [row for row in data["rows"] if row["phase"] == phase]:
            panels.append(partial(_throughput, rows=rows))
        if rows := [row for row in data["layer"] if row["phase"] == phase]:
            panels.append(partial(_layer, rows=rows))
    if data["conv"]:
        panels.append(partial(_conv, rows=data["conv"]))
    for captured in (False, True):
        if rows := [row for row in data["strategies"] if row["captured"] == captured]:
            panels.append(partial(_strategies, rows=rows))
    return panels, []


def _throughput(axis: "Axes", rows: Rows) -> None:
    """Tokens per second of prefill; of decode the time of a step, as sequences differ too much for one scale."""
    prefills = rows[0]["phase"] == "prefill"
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        label = f"{row['tokens']}" if prefills else f"{row['batch']}\n{row['mode']}"
        found.setdefault(label, {})[row["variant"]] = row["tokens_per_s" if prefills else "ms"]
    variants = dict.fromkeys(row["variant"] for row in rows)
    series = {variant: [times.get(variant) for times in found.values()] for variant in variants}
    title = "Prefill, whole model" if prefills else f"Decode after {rows[0]['context']} tokens, whole model"
    _bars(axis, list(found), series, title, "tokens/s" if prefills else "time per step (ms)")
    axis.set_xlabel("tokens" if prefills else "sequences")


def _layer(axis: "Axes", rows: Rows) -> None:
    """Before and after side by side, each stacked by part."""
    phase = rows[0]["phase"]
    names = list(dict.fromkeys(part["part"] for row in rows for part in row["parts"]))
    whole = [row["untouched_us"] for row in rows]
    for side, (key, hatch) in enumerate((("untouched_us", ""), ("accelerated_us", "//"))):
        bottom = [0.0] * len(rows)
        for i, name in enumerate(names):
            heights = [
                sum(p[key] for p in row["parts"] if p["part"] == name) / us for row, us in zip(rows, whole, strict=True)
            ]
            places = [place + 0.4 * side - 0.2 for place in range(len(rows))]
            axis.bar(places, heights, 0.36, bottom, color=f"C{i}", hatch=hatch, label=None if side else name)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    labels = [
        f"{row['tokens'] if phase == 'prefill' else row['batch']}\n{us:.0f} µs"
        for row, us in zip(rows, whole, strict=True)
    ]
    axis.set_xticks(range(len(rows)), labels)
    axis.set(
        title=f"A layer without its delta rule, {phase}; hatched: accelerated", ylabel="of the untouched layer's time"
    )
    axis.set_xlabel(f"{'tokens' if phase == 'prefill' else 'sequences'}, and time of the untouched layer")
    axis.grid(visible=False, axis="x")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _conv(axis: "Axes", rows: Rows) -> None:
    one_pass = {row["tokens"]: row["us"] for row in rows if row["variant"] == "one pass"}
    found = {(row["tokens"], row["variant"]): row["ratio"] for row in rows}
    variants = dict.fromkeys(row["variant"] for row in rows)
    series = {variant: [found.get((tokens, variant)) for tokens in one_pass] for variant in variants}
    labels = [f"{tokens}\n{us:.0f} µs" for tokens, us in one_pass.items()]
    _bars(axis, labels, series, "From projection to delta rule", "device time, of one pass")
    axis.set_xlabel("tokens, and time of one pass")


def _strategies(axis: "Axes", rows: Rows) -> None:
    for name in rows[0]["us"]:
        axis.plot([row["rows"] for row in rows], [row["us"][name] for row in rows], marker=".", label=name)
    chosen = [row["us"][row["chosen"]] for row in rows]
    axis.plot([row["rows"] for row in rows], chosen, "k*", markersize=10, label="auto", linestyle="none")
    captured = rows[0]["captured"]
    title = f"gdn_in_proj, {'captured' if captured else 'eager'}"
    axis.set(title=title, xlabel="rows", ylabel=f"{'device' if captured else 'wall'} time per call (µs)")
    axis.set(xscale="log", yscale="log")
    axis.legend()


# By a key that only this kind of file has.
DRAWINGS: Mapping[str, Callable[[Mapping[str, Any]], tuple[list[Draw], list[float]]]] = {
    "ceiling_gb_s": _ops,
    "tower": _encoder,
    "strategies": _model,
}
