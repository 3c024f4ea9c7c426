"""Panels of `polyfuse bench`."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from polyfuse.bench.plots.figure import Panels, Rows, bar_offset

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Times = dict[str, dict[str, float]]  # microseconds by case and backend


def op_panels(data: Mapping[str, Any]) -> Panels:
    """A panel for each op: device time of each case, one bar for each backend."""
    rows: Rows = data["rows"]
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    times: dict[str, Times] = {}
    for row in rows:
        cases = times.setdefault(row["op"], {})
        cases.setdefault(f"{row['model']}, {row['case']}", {})[row["backend"]] = row["device_us"]
    panels = Panels()
    for op, cases in times.items():
        panels.draws.append(partial(_draw, op=op, times=cases, backends=backends))
        panels.heights.append(1.1 + 0.42 * len(cases))
    return panels


def _draw(axis: "Axes", op: str, times: Times, backends: Sequence[str]) -> None:
    for i, backend in enumerate(backends):
        places, found = [], []
        for place, case in enumerate(times.values()):
            if backend in case:
                places.append(place + bar_offset(i, len(backends)))
                found.append(case[backend])
        axis.barh(places, found, 0.8 / len(backends), label=backend, color=f"C{i}")
    axis.set_yticks(range(len(times)), list(times))
    axis.invert_yaxis()
    axis.set(title=op, xlabel="device time per call (µs)", xscale="log")
    axis.grid(visible=False, axis="y")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
