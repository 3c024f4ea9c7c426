"""Draw the committed results of the checkout that this is run in, and the figure of all ops beside the limit."""

import json
from pathlib import Path

from polyfuse.bench.plots import charts_of, origin_of, plot
from polyfuse.bench.plots.figure import draw
from polyfuse.bench.plots.limit import LIMIT, RESULTS, limit_chart


def main(benchmarks: Path) -> None:
    """Draw every file in the results of a `benchmarks` folder that has charts, and the limit, into its plots."""
    for path in sorted((benchmarks / "results").glob("*.json")):
        if charts_of(json.loads(path.read_text(encoding="utf-8"))):
            plot(path, benchmarks / "plots")
    files = [json.loads((benchmarks / f"results/{name}.json").read_text(encoding="utf-8")) for name in RESULTS]
    draw(limit_chart(files), origin_of(files[0]), benchmarks / "plots" / f"{LIMIT}.svg")


if __name__ == "__main__":
    main(Path("benchmarks"))
