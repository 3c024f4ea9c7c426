"""What a figure shows, as data: rows of values in sections, all on one scale. Needs nothing that draws.

A figure and the caption under it on a page are made from the same chart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyfuse.bench.measured import Result, named_versions

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Series:
    """One column of values; `role` gives its colour and its mark, the same in every figure.

    The roles: `ours`, `ours, other`, `peer`, `plain` (what there is without either), `other` and `limit`.
    """

    name: str
    role: str


@dataclass(frozen=True)
class Row:
    """What was measured, in words, and a value for each series; None where nothing was measured."""

    label: str
    values: Sequence[float | None]
    chosen: int | None = None


@dataclass(frozen=True)
class Section:
    """Rows that share their series, under a heading."""

    title: str
    series: Sequence[Series]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Chart:
    """A figure: `part` follows the results' name in that of its file, `unit` is written at its one axis."""

    part: str
    title: str
    unit: str
    sections: Sequence[Section]
    note: str = ""
    line_at: float | None = None

    def name(self, stem: str) -> str:
        """The name of the figure's file, without its ending."""
        return f"{stem}_{self.part}" if self.part and not stem.startswith(self.part) else stem


def made_on(data: Result, dtype: str) -> str:
    """Device, dtype and versions of a file of results, as figures and captions name them."""
    device = str(data["device"]).partition("(")[2].rstrip(")") or data["device"]
    return ", ".join([device, dtype, *named_versions(data)])


def embedded(chart: Chart, stem: str, origin: str) -> str:
    """The figure of a chart in Markdown, for a page in docs: the picture, what it shows in words, and its origin."""
    series = dict.fromkeys(series.name for section in chart.sections for series in section.series)
    alternative = f"{chart.title}, {chart.unit}: {'; '.join(series)}"
    picture = f"![{alternative}](../benchmarks/plots/{chart.name(stem)}.svg)"
    return f"{picture}\n\n*{chart.title}: {chart.unit}. {origin}.*"
