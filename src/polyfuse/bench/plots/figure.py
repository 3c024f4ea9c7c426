"""A chart as a figure: dots on one log axis, every value written beside them, for light and for dark pages.

All measures are points. A figure is narrow and its text large in it, so that it reads on a phone.
"""

import re
import textwrap
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyfuse.bench.measured import short
from polyfuse.bench.plots.chart import Chart, Row, Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The track holds the dots, a column the values of one series; of more columns than fit a figure is wider.
WIDTH, MARGIN, SHORTEST, GAP, COLUMN = 440.0, 12.0, 170.0, 12.0, 57.0
TITLE, SMALL, HEAD, ROW, TICKS = 17.0, 12.0, 11.0, 32.0, 22.0  # heights
# Text stays text, and the same chart gives the same file.
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "polyfuse"}
INK, MUTED, GRID, PAPER = "#1f2328", "#59636e", "#d9dee3", "#ffffff"
MARKS = {
    "limit": (INK, "|"),
    "ours": ("#0b6e4f", "o"),
    "ours, other": ("#1f5fbf", "^"),
    "peer": ("#b45f06", "s"),
    "plain": ("#6e7780", "D"),
    "other": ("#8e44ad", "v"),
}
# What each colour is on a dark page.
DARK = {
    INK: "#e6edf3",
    MUTED: "#9da7b1",
    GRID: "#343b43",
    PAPER: "#0d1117",
    "#0b6e4f": "#3fb98a",
    "#1f5fbf": "#6ea8fe",
    "#b45f06": "#f0973a",
    "#6e7780": "#a9b1ba",
    "#8e44ad": "#c792ea",
}


def draw(chart: Chart, made_on: str, target: Path) -> Path:
    """Write the figure of a chart as SVG, or as PNG, which is for light pages; returns its path."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = make_figure(chart, made_on)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
    if target.suffix == ".svg":
        text = re.sub(r"[ \t]+$", "", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
        target.write_text(re.sub(r"(<svg [^>]*>)", rf"\1\n{_dark_style()}", text, count=1), encoding="utf-8")
    return target


def _dark_style() -> str:
    rules = []
    for light, dark in DARK.items():
        rules += [f'[style*="{key}: {light}"] {{ {key}: {dark} !important }}' for key in ("fill", "stroke")]
    return "<style>@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}</style>"


@dataclass(frozen=True)
class Scale:
    """The log axis that a figure has: from which value to which, its length, and its ticks."""

    least: float
    most: float
    track: float

    @classmethod
    def of(cls, chart: Chart, track: float) -> "Scale":
        """The axis that shows every value. A limit may lie off it: the smallest calls have next to no bytes."""
        shown = [chart.line_at] if chart.line_at else []
        for section in chart.sections:
            for row in section.rows:
                pairs = zip(section.series, row.values, strict=True)
                shown += [value for series, value in pairs if value and series.role != "limit"]
        return cls(min(shown) / 1.12, max(shown) * 1.12, track)

    def x(self, value: float) -> float:
        """Where a value lies, from the figure's left edge."""
        share = log10(value / self.least) / log10(self.most / self.least)
        return MARGIN + share * self.track

    def column(self, place: int) -> float:
        """The right edge of a column of values."""
        return MARGIN + self.track + GAP + COLUMN * (place + 1)

    def ticks(self) -> list[float]:
        """Powers of ten, and their multiples by 2 and 5 where there is room."""
        powers = range(floor(log10(self.least)), ceil(log10(self.most)) + 1)
        for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
            found = [10.0**power * step for power in powers for step in steps]
            found = [tick for tick in found if self.least <= tick <= self.most]
            # Half of each of two labels lies between their ticks, and a digit is 5.5 wide.
            room = [self.x(b) - self.x(a) - 2.75 * len(f"{a:,g}{b:,g}") for a, b in pairwise(found)]
            if len(found) >= 2 and min(room) > 3:
                break
        return found


def make_figure(chart: Chart, made_on: str) -> "Figure":
    """Title and origin, the sections below one another, and what the axis means."""
    from matplotlib.figure import Figure

    columns = GAP + COLUMN * max(len(section.series) for section in chart.sections)
    scale = Scale.of(chart, max(SHORTEST, WIDTH - 2 * MARGIN - columns))
    width = 2 * MARGIN + scale.track + columns
    title = textwrap.wrap(chart.title, int(width / 8.4))
    small = textwrap.wrap(made_on, int(width / 5.4))
    notes = textwrap.wrap(". ".join(filter(None, (f"Dots and values: {chart.unit}", chart.note))), int(width / 5.4))
    height = 2 * MARGIN + TITLE * len(title) + SMALL * (len(small) + len(notes))
    height += sum(_height(section, scale) for section in chart.sections)
    figure = Figure(figsize=(width / 72, height / 72), facecolor=PAPER)
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    page.set_axis_off()
    y = MARGIN
    for line in title:
        _text(page, MARGIN, y + TITLE / 2, line, 12, weight="bold")
        y += TITLE
    for line in small:
        _text(page, MARGIN, y + SMALL / 2, line, 8.5, MUTED)
        y += SMALL
    for section in chart.sections:
        _section(page, section, scale, y, chart.line_at)
        y += _height(section, scale)
    for line in notes:
        _text(page, MARGIN, y + SMALL / 2, line, 8.5, MUTED)
        y += SMALL
    return figure


def _heading(section: Section, track: float) -> tuple[list[str], list[list[str]]]:
    """The lines of a section's heading, and those of each of its columns."""
    columns = []
    for series in section.series:
        name = series.name.replace("+ ", "+\N{NO-BREAK SPACE}").replace(".", " .")
        columns.append(textwrap.wrap(name, 11, break_long_words=False))
    return textwrap.wrap(section.title, int(track / 6)), columns


def _height(section: Section, scale: Scale) -> float:
    heading, columns = _heading(section, scale.track)
    lines = max(len(heading), *(len(column) + 1 for column in columns))
    return 14 + HEAD * lines + ROW * len(section.rows) + TICKS


def _section(page: "Axes", section: Section, scale: Scale, y: float, line_at: float | None) -> None:
    heading, columns = _heading(section, scale.track)
    y += 14
    lines = max(len(heading), *(len(column) + 1 for column in columns))
    for i, line in enumerate(heading):
        _text(page, MARGIN, y + HEAD * (lines - len(heading) + i + 0.5), line, 10, weight="bold")
    for place, (series, words) in enumerate(zip(section.series, columns, strict=True)):
        x = scale.column(place)
        colour, mark = MARKS[series.role]
        _dot(page, x - 4, y + HEAD / 2 - 1, colour, mark)
        for i, word in enumerate(words):
            _text(page, x, y + HEAD * (i + 1.5), word, 8.5, MUTED, ha="right")
    y += HEAD * lines
    bottom = y + ROW * len(section.rows)
    for tick in scale.ticks():
        _text(page, scale.x(tick), bottom + 9, f"{tick:,g}", 8.5, MUTED, ha="center")
    for row in section.rows:
        for tick in scale.ticks():
            page.plot([scale.x(tick)] * 2, [y + 17, y + 29], color=GRID, linewidth=0.8, zorder=1)
        if line_at is not None:
            page.plot([scale.x(line_at)] * 2, [y + 16, y + 30], color=INK, linewidth=1.4, zorder=2)
        _row(page, section, row, scale, y)
        y += ROW


def _row(page: "Axes", section: Section, row: Row, scale: Scale, y: float) -> None:
    """The row's label, and below it its dots and their values; the least of them bold."""
    _text(page, MARGIN, y + 10, row.label, 9.5)
    middle = y + 23
    page.plot([MARGIN, MARGIN + scale.track], [middle, middle], color=GRID, linewidth=0.8, zorder=1)
    measured = [v for v, s in zip(row.values, section.series, strict=True) if v is not None and s.role != "limit"]
    places = range(len(row.values))
    for place in sorted(places, key=lambda place: section.series[place].role.startswith("ours")):  # ours above others
        value, series = row.values[place], section.series[place]
        colour, mark = MARKS[series.role]
        if value is not None and value >= scale.least:
            _dot(page, scale.x(value), middle, colour, mark)
        star = "★ " if row.chosen == place else ""
        best = value is not None and series.role != "limit" and short(value) == short(min(measured))
        text = star + (short(value) if value is not None else "-")
        _text(page, scale.column(place), middle, text, 9.5, weight="bold" if best else "normal", ha="right")


def _dot(page: "Axes", x: float, y: float, colour: str, mark: str) -> None:
    edge = 2.0 if mark == "|" else 0.0
    size = 11.0 if mark == "|" else 6.0
    page.plot([x], [y], mark, color=colour, markersize=size, markeredgewidth=edge, linestyle="none", zorder=3)


def _text(page: "Axes", x: float, y: float, text: str, size: float, colour: str = INK, **style: Any) -> None:
    page.text(x, y, text, size=size, color=colour, va="center_baseline", **style)
