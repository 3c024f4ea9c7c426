"""A figure of how far each memory-bound op is from its bytes' time. Needs matplotlib.

`python -m polyfuse.bench.limits` draws it from the committed results of `polyfuse bench`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyfuse.bench.page import FIGURE, bytes_us, read

RESULTS = ("h200", "gdn_conv_prep_h200")
LEAST_US = 10.0  # below, a call is a launch and not a stream
PRODUCTS = ("gdn_in_proj",)  # limited by arithmetic
# A label, a colour and a mark for each way to run a call.
WAYS = (("polyfuse, Triton", "#0b6e4f", "o"), ("torch.compile", "#d17a00", "s"), ("eager PyTorch", "#7a7a7a", "D"))
# Text stays text, and the same results give the same file.
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "polyfuse", "font.size": 10}


@dataclass(frozen=True)
class Line:
    """One case: its bytes' time, and the times of `WAYS` as multiples of it."""

    op: str
    case: str
    limit_us: float
    multiples: tuple[float, ...]


def lines(results: Path) -> list[Line]:
    """The cases of a folder of results whose bytes take long enough, by op and then by their time."""
    found = []
    for name in RESULTS:
        data = read(results / f"{name}.json")
        for row in data["rows"]:
            limit = bytes_us(row, data["ceiling_gb_s"])
            if row["backend"] == "triton" and row["op"] not in PRODUCTS and limit >= LEAST_US:
                ours = row["device_us"] / limit
                multiples = (ours, ours * row["compile_ratio"], ours * row["eager_ratio"])
                found.append(Line(row["op"], f"{row['model']} {row['case']}", limit, multiples))
    return sorted(found, key=lambda line: (line.op, line.limit_us))


def draw(cases: Sequence[Line], device: str, target: Path) -> None:
    """Write the figure: a line for each case, a mark for each way, one scale."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    with rc_context(STYLE):
        figure = Figure(figsize=(10, 1.3 + 0.28 * len(cases)), layout="constrained")
        axis = figure.subplots()
        places = range(len(cases))
        for way, (label, colour, mark) in enumerate(WAYS):
            axis.scatter([c.multiples[way] for c in cases], places, color=colour, marker=mark, label=label, zorder=3)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_yticks(places, [f"{c.op}  {c.case}  ({c.limit_us:.0f} µs)" for c in cases])
        axis.invert_yaxis()
        axis.set(xscale="log", xlabel=f"time of a call over that of its bytes; {device}")
        axis.set_xticks([1, 2, 5, 10, 20, 50, 100])
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        figure.legend(loc="outside upper center", ncols=len(WAYS), frameon=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def main() -> None:
    """Draw the figure of the checkout that this is run in."""
    results = Path("benchmarks/results")
    device = str(read(results / f"{RESULTS[0]}.json")["device"]).removeprefix("cuda (").rstrip(")")
    draw(lines(results), device, Path("benchmarks/plots") / FIGURE)


if __name__ == "__main__":
    main()
