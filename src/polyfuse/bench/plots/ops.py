"""Charts of `polyfuse bench`: the latency of each op's cases beside the limit and the peers."""

from collections.abc import Mapping, Sequence
from typing import Any

from polyfuse.bench.measured import bytes_us
from polyfuse.bench.plots.chart import Chart, Row, Section, Series
from polyfuse.bench.plots.labels import case_label, model_label

LIMIT = Series("limit by bytes", "limit")
NOTE = "The limit is each byte once, as fast as a large copy; below the axis it is not drawn."
# By the name of the ratio that a row has of each.
PEERS = {"compile": Series("torch.compile", "peer"), "eager": Series("eager PyTorch", "plain")}
# Backends of JAX arrays, whose times are not device times alone.
JAX = ("pallas", "jax")
ROLES = {"triton": "ours", "pallas": "ours", "jax": "peer"}


def op_charts(data: Mapping[str, Any]) -> list[Chart]:
    """A chart for each op: a section for PyTorch tensors, and one for JAX arrays."""
    by_op: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for row in data["rows"]:
        label = f"{model_label(row['model'])}, {case_label(row['case'])}"
        by_op.setdefault(row["op"], {}).setdefault(label, {})[row["backend"]] = row
    charts = []
    for op, cases in by_op.items():
        backends = list(dict.fromkeys(name for rows in cases.values() for name in rows))
        sections = [_torch(cases, data["ceiling_gb_s"], [name for name in backends if name not in (*JAX, "torch")])]
        if arrays := [name for name in JAX if name in backends]:
            sections.append(_jax(cases, data["ceiling_gb_s"], arrays))
        kept = [section for section in sections if section.rows]
        charts.append(Chart(op, op, "time of a call, µs", kept, NOTE))
    return charts


def _series(names: Sequence[str]) -> list[Series]:
    return [Series(name, ROLES.get(name, "other")) for name in names]


def _torch(cases: Mapping[str, Mapping[str, Any]], ceiling: float, backends: Sequence[str]) -> Section:
    rows = []
    for label, found in cases.items():
        tensors = [row for name, row in found.items() if name not in JAX]
        if tensors:
            base = found.get("triton", tensors[0])
            own = [found[name]["device_us"] if name in found else None for name in backends]
            peers = [base["device_us"] * ratio if (ratio := base[f"{key}_ratio"]) else None for key in PEERS]
            rows.append(Row(label, [bytes_us(base, ceiling), *own, *peers]))
    return Section("PyTorch tensors, device time", [LIMIT, *_series(backends), *PEERS.values()], rows)


def _jax(cases: Mapping[str, Mapping[str, Any]], ceiling: float, backends: Sequence[str]) -> Section:
    rows = []
    for label, found in cases.items():
        if arrays := [found[name] for name in backends if name in found]:
            own = [found[name]["device_us"] if name in found else None for name in backends]
            rows.append(Row(label, [bytes_us(arrays[0], ceiling), *own]))
    return Section("JAX arrays, wall time of calls in a row", [LIMIT, *_series(backends)], rows)
