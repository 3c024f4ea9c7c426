"""A figure of several panels, and the dots or groups of bars that some of them show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
    "axes.axisbelow": True,
    "legend.fontsize": 8,
}

Draw = Callable[["Axes"], None]
Rows = Sequence[Mapping[str, Any]]


@dataclass
class Panels:
    """What draws each panel of a figure, and the panels' heights, if they have heights of their own."""

    draws: list[Draw] = field(default_factory=list)
    heights: list[float] = field(default_factory=list)


def make_figure(panels: Panels) -> "Figure":
    """The panels above one another if they have heights of their own, else in two columns."""
    from matplotlib.figure import Figure

    count = len(panels.draws)
    if panels.heights:
        figure = Figure(figsize=(WIDTH, sum(panels.heights)), layout="constrained")
        axes = figure.subplots(count, 1, squeeze=False, height_ratios=panels.heights)
    else:
        columns = min(2, count)
        lines = -(-count // columns)
        figure = Figure(figsize=(WIDTH, PANEL * lines + 0.5), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False)
    cells = list(axes.flat)
    for draw, axis in zip(panels.draws, cells, strict=False):
        draw(axis)
    for axis in cells[count:]:
        axis.set_visible(False)
    return figure


def dots(
    axis: "Axes", labels: Sequence[str], series: Mapping[str, Sequence[float | None]], title: str, unit: str
) -> None:
    """A line for each label, from the top, with a dot for each series on a log axis; None leaves a dot out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name, values in series.items():
        shown = [(value, place) for place, value in enumerate(values) if value is not None]
        axis.plot([value for value, _ in shown], [place for _, place in shown], "o", label=name, alpha=0.8)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set(title=title, xlabel=unit, xscale="log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.legend()


def bars(
    axis: "Axes", labels: Sequence[str], series: Mapping[str, Sequence[float | None]], title: str, unit: str
) -> None:
    """Groups of upright bars, a group for each label; None leaves a bar out."""
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        places = [place + bar_offset(i, len(series)) for place in range(len(labels))]
        axis.bar(places, [0.0 if value is None else value for value in values], width, label=name)
    axis.set_xticks(range(len(labels)), labels)
    axis.set(title=title, ylabel=unit)
    axis.grid(visible=False, axis="x")
    axis.legend()


def bar_offset(i: int, count: int) -> float:
    """How far the middle of bar `i` of a group of `count` is from the middle of the group."""
    return (i - (count - 1) / 2) * 0.8 / count
