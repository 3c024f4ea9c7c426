"""Panels of `polyfuse bench model`."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from polyfuse.bench.baseline import compare, size_of
from polyfuse.bench.plots.figure import Panels, Rows, dots

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def model_panels(data: Mapping[str, Any]) -> Panels:
    """Calls of the whole model, a layer by its parts, conv in one pass or two, and strategies of the projection."""
    panels = Panels()
    for phase in ("prefill", "decode"):
        if rows := [row for row in data["rows"] if row["phase"] == phase]:
            panels.draws.append(partial(_whole, rows=rows))
        # Files from before the delta rule was one of the parts have no variants.
        if rows := [row for row in data["layer"] if row["phase"] == phase and "variant" in row]:
            panels.draws.append(partial(_layer, rows=rows))
    if data["conv"]:
        panels.draws.append(partial(_conv, rows=data["conv"]))
    for captured in (False, True):
        if rows := [row for row in data["strategies"] if row["captured"] == captured]:
            panels.draws.append(partial(_strategies, rows=rows))
    return panels


def _whole(axis: "Axes", rows: Rows) -> None:
    """A line for each call, with the time of each variant."""
    calls = compare(rows)
    prefills = rows[0]["phase"] == "prefill"
    series = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        series[variant] = [call.ms.get(variant) for call in calls]
    labels = []
    for call in calls:
        labels.append(f"{call.call['tokens']:,}" if prefills else f"{call.call['batch']}, {call.call['mode']}")
    title = "Prefill, whole model" if prefills else f"Decode after {rows[0]['context']} tokens, whole model"
    dots(axis, labels, series, title, "time (ms)")
    axis.set_ylabel("tokens" if prefills else "sequences")


def _layer(axis: "Axes", rows: Rows) -> None:
    """A line for each part of the largest call; what takes no time is left out."""
    largest = max(rows, key=lambda row: row["batch"] * row["tokens"])
    shown = {row["variant"]: row for row in rows if size_of(row) == size_of(largest)}
    parts = list(dict.fromkeys(part for row in shown.values() for part in row["parts"]))
    series = {}
    for variant, row in shown.items():
        times = [row["us"], *(row["parts"].get(part, 0) for part in parts)]
        series[variant] = [us if us > 0 else None for us in times]
    dots(axis, ["all", *parts], series, f"One layer, {size_of(largest)}", "device time (µs)")


def _conv(axis: "Axes", rows: Rows) -> None:
    lengths = list(dict.fromkeys(row["tokens"] for row in rows))
    found = {(row["tokens"], row["variant"]): row["us"] for row in rows}
    series = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        series[variant] = [found.get((tokens, variant)) for tokens in lengths]
    dots(axis, [f"{tokens:,}" for tokens in lengths], series, "From projection to delta rule", "device time (µs)")
    axis.set_ylabel("tokens")


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
