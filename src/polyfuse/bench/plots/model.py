"""Panels of `polyfuse bench model`."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from polyfuse.bench.plots.figure import Panels, Rows, bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def model_panels(data: Mapping[str, Any]) -> Panels:
    """Throughput, a layer by its parts, conv in one pass or two, and strategies of the projection."""
    panels = Panels()
    for phase in ("prefill", "decode"):
        if rows := [row for row in data["rows"] if row["phase"] == phase]:
            panels.draws.append(partial(_throughput, rows=rows))
        if rows := [row for row in data["layer"] if row["phase"] == phase]:
            panels.draws.append(partial(_layer, rows=rows))
    if data["conv"]:
        panels.draws.append(partial(_conv, rows=data["conv"]))
    for captured in (False, True):
        if rows := [row for row in data["strategies"] if row["captured"] == captured]:
            panels.draws.append(partial(_strategies, rows=rows))
    return panels


def _throughput(axis: "Axes", rows: Rows) -> None:
    """Bars of tokens per second for prefill, and of the time of a step for decode.

    Tokens per second of different numbers of sequences would not fit one scale.
    """
    prefills = rows[0]["phase"] == "prefill"
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        label = f"{row['tokens']}" if prefills else f"{row['batch']}\n{row['mode']}"
        found.setdefault(label, {})[row["variant"]] = row["tokens_per_s" if prefills else "ms"]
    variants = dict.fromkeys(row["variant"] for row in rows)
    series = {variant: [times.get(variant) for times in found.values()] for variant in variants}
    title = "Prefill, whole model" if prefills else f"Decode after {rows[0]['context']} tokens, whole model"
    bars(axis, list(found), series, title, "tokens/s" if prefills else "time per step (ms)")
    axis.set_xlabel("tokens" if prefills else "sequences")


def _layer(axis: "Axes", rows: Rows) -> None:
    """Bars before and after side by side, each stacked by part."""
    prefills = rows[0]["phase"] == "prefill"
    names = list(dict.fromkeys(part["part"] for row in rows for part in row["parts"]))
    _stack(axis, rows, names, "untouched_us", place=-0.2)
    _stack(axis, rows, names, "accelerated_us", place=0.2, hatch="//", labelled=False)
    labels = []
    for row in rows:
        labels.append(f"{row['tokens' if prefills else 'batch']}\n{row['untouched_us']:.0f} µs")
    axis.set_xticks(range(len(rows)), labels)
    title = f"A layer without its delta rule, {rows[0]['phase']}; hatched: accelerated"
    axis.set(title=title, ylabel="of the untouched layer's time")
    axis.set_xlabel(f"{'tokens' if prefills else 'sequences'}, and time of the untouched layer")
    axis.grid(visible=False, axis="x")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _stack(
    axis: "Axes", rows: Rows, names: Sequence[str], key: str, place: float, hatch: str = "", labelled: bool = True
) -> None:
    """One bar for each row: its parts on one another, as shares of the untouched layer's time."""
    places = [i + place for i in range(len(rows))]
    bottom = [0.0] * len(rows)
    for i, name in enumerate(names):
        heights = []
        for row in rows:
            us = sum(part[key] for part in row["parts"] if part["part"] == name)
            heights.append(us / row["untouched_us"])
        axis.bar(places, heights, 0.36, bottom, color=f"C{i}", hatch=hatch, label=name if labelled else None)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]


def _conv(axis: "Axes", rows: Rows) -> None:
    one_pass = {row["tokens"]: row["us"] for row in rows if row["variant"] == "one pass"}
    found = {(row["tokens"], row["variant"]): row["ratio"] for row in rows}
    variants = dict.fromkeys(row["variant"] for row in rows)
    series = {variant: [found.get((tokens, variant)) for tokens in one_pass] for variant in variants}
    labels = [f"{tokens}\n{us:.0f} µs" for tokens, us in one_pass.items()]
    bars(axis, labels, series, "From projection to delta rule", "device time, of one pass")
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
