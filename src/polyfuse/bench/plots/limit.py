"""The chart of how far each memory-bound op is from the time of its bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

from polyfuse.bench.measured import bytes_us
from polyfuse.bench.plots.chart import Chart, Row, Section, Series
from polyfuse.bench.plots.labels import case_label, model_label
from polyfuse.bench.plots.ops import PEERS

LIMIT, RESULTS = "limit_h200", ("h200", "gdn_conv_prep_h200")
LEAST_US = 10.0  # below, a call is a launch and not a stream
PRODUCTS = ("gdn_in_proj",)  # limited by arithmetic


def limit_chart(files: Sequence[Mapping[str, Any]]) -> Chart:
    """Each case that is a stream of bytes: its time over the time of its bytes, in Triton and by the peers."""
    found = []
    for data in files:
        for row in data["rows"]:
            limit = bytes_us(row, data["ceiling_gb_s"])
            if row["backend"] == "triton" and row["op"] not in PRODUCTS and limit >= LEAST_US:
                found.append((row["op"], limit, row))
    sections = []
    series = [Series("triton", "ours"), *PEERS.values()]
    for op in sorted({op for op, _, _ in found}):
        rows = []
        for _, limit, row in sorted((f for f in found if f[0] == op), key=lambda f: f[1]):
            ours = row["device_us"] / limit
            label = f"{model_label(row['model'])}, {case_label(row['case'])} ({limit:.0f} µs)"
            rows.append(Row(label, [ours, ours * row["compile_ratio"], ours * row["eager_ratio"]]))
        sections.append(Section(op, series, rows))
    title, unit = "How far ops are from the limit of memory", "device time of a call over that of its bytes"
    note = "In brackets the time of the bytes, each once, as fast as a large copy; the line at 1 is that limit."
    return Chart("", title, unit, sections, note, line_at=1.0)
