"""docs/benchmarks.md: the committed results as figures and tables.

`python -m polyfuse.bench.page` writes the page from `benchmarks/results/*.json` and the text around the tables in
`benchmarks/page.md.j2`. A result names the command, the commit and the date that it was made with under `made`, which
is added by hand when the file is committed: a new run drops it, and the page is refused until it is there again.
A conformance report says so itself.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from polyfuse.bench.baseline import compare, size_of, variants_of
from polyfuse.bench.measured import Result, bytes_us, named_versions, read, short
from polyfuse.bench.plots import charts_of, origin_of
from polyfuse.bench.plots.chart import embedded
from polyfuse.bench.plots.labels import case_label, model_label
from polyfuse.bench.plots.limit import LIMIT, RESULTS, limit_chart
from polyfuse.bench.plots.model import subject_of

TEMPLATE = "page.md.j2"
Cells = Sequence[object]


def render(benchmarks: Path) -> str:
    """The page that the results in a `benchmarks` folder give.

    Raises `SpecError` for a result that does not say how it was made.
    """
    results = {path.stem: read(path) for path in sorted((benchmarks / "results").glob("*.json"))}
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    tables: dict[str, Callable[..., str]] = {
        "caption": lambda name: caption(name, results[name]),
        "limit": lambda: embedded(limit_chart([results[name] for name in RESULTS]), LIMIT, origin_of(results["h200"])),
        "figures": lambda name, *parts: figures(name, results[name], parts),
        "ops": lambda *names: ops({name: results[name] for name in names}),
        "jax": lambda *names: jax([results[name] for name in names]),
        "host": lambda name: host(results[name]),
        "tower": lambda name: tower(results[name]),
        "trace": lambda name: trace(results[name]["trace"]),
        "parallel": lambda name: parallel(results[name]["parallel"]),
        "soak": lambda name: soak(results[name]),
        "subject": lambda name: subject_of(results[name]),
        "rules": lambda name: rules(results[name]),
        "layers": lambda name: layers(results[name]),
        "whole_model": lambda name: whole_model(results[name]),
        "conv": lambda name: conv(results[name]),
        "conformance": lambda: conformance(results),
        "sanitizer": lambda name: sanitizer(results[name]),
    }
    template = environment.from_string((benchmarks / TEMPLATE).read_text(encoding="utf-8"))
    return template.render(tables, results=results)


def caption(name: str, data: Result) -> str:
    """What a result was made with: file, command, commit, date, device and versions."""
    made = data["made"]
    said = [f"`{made['by']}` at {made['commit']}", made["date"], data["device"], *named_versions(data)]
    note = f"; {made['note']}" if "note" in made else ""
    return f"[{name}.json](../benchmarks/results/{name}.json): {', '.join(said)}{note}."


def table(columns: Sequence[str], rows: Iterable[Cells], texts: int = 1) -> str:
    """A Markdown table whose first `texts` columns are text, and the others numbers."""
    lines = [columns, ["---"] * texts + ["---:"] * (len(columns) - texts), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _by_case(data: Result) -> dict[tuple[str, str, str], dict[str, Result]]:
    """(op, model, case) to its rows by backend."""
    found: dict[tuple[str, str, str], dict[str, Result]] = {}
    for row in data["rows"]:
        found.setdefault((row["op"], row["model"], row["case"]), {})[row["backend"]] = row
    return found


def figures(name: str, data: Result, parts: Sequence[str] = ()) -> str:
    """The figures of a file of results, or those of some parts, each with its caption."""
    charts = [chart for chart in charts_of(data) if not parts or chart.part in parts]
    return "\n\n".join(embedded(chart, name, origin_of(data)) for chart in charts)


def ops(results: Mapping[str, Result]) -> str:
    """Each case in Triton beside its bytes' time, `torch.compile` and eager PyTorch; figure and table of each op."""
    lines: dict[str, list[Cells]] = {}
    files: dict[str, str] = {}
    for name, data in results.items():
        for (op, model, case), rows in _by_case(data).items():
            ours = rows["triton"]
            us = ours["device_us"]
            compiled = us * ours["compile_ratio"] if ours["compile_ratio"] else None
            times = (bytes_us(ours, data["ceiling_gb_s"]), us, compiled, us * ours["eager_ratio"])
            files[op] = name
            label = f"{model_label(model)}, {case_label(case)}"
            lines.setdefault(op, []).append((label, *map(short, times), short(ours["host_us"])))
    columns = ("case", "limit by bytes, us", "triton, us", "torch.compile, us", "eager PyTorch, us", "host, us")
    beside = peers(results.values())
    parts = []
    for op, rows in lines.items():
        shown = figures(files[op], results[files[op]], [op])
        parts += [f"### {op}", shown, table(columns, rows), *([beside[op]] if op in beside else [])]
    return "\n\n".join(parts)


def peers(results: Iterable[Result]) -> dict[str, str]:
    """What other packages took on the same inputs in the same run, a table for each op that has such results."""
    lines: dict[str, list[Cells]] = {}
    for row in (row for data in results for row in data.get("peers", ())):
        if row["device_us"] is None:
            continue
        ratios = ("-" if value is None else f"{value:.2f}x" for value in (row["ratio"], row["cold_ratio"]))
        times = short(row["device_us"]), short(row["cold_us"])
        label = f"{model_label(row['model'])}, {case_label(row['case'])}"
        texts = label, f"{row['peer']} {row['version']}", row["status"]
        lines.setdefault(row["op"], []).append((*texts, *times, *ratios))
    columns = ("case", "peer", "by the oracle", "us", "cold, us", "times ours", "cold, times ours")
    return {op: table(columns, rows, texts=3) for op, rows in lines.items()}


def jax(results: Sequence[Result]) -> str:
    """The largest case of each op on JAX arrays."""
    largest: dict[str, Cells] = {}
    for data in results:
        cases = sorted(_by_case(data).items(), key=lambda item: bytes_us(item[1]["jax"], data["ceiling_gb_s"]))
        for (op, model, case), rows in cases:
            times = (bytes_us(rows["jax"], data["ceiling_gb_s"]), rows["pallas"]["device_us"], rows["jax"]["device_us"])
            largest[op] = (op, f"{model_label(model)}, {case_label(case)}", *map(short, times))
    return table(("op", "case", "limit by bytes, us", "pallas, us", "jax, us"), largest.values(), texts=2)


def host(data: Result) -> str:
    """What the dispatcher adds to a call, and where it was measured, the call's other host time."""
    rows = []
    for row in data["rows"]:
        times = [row["resolution_ns"], row["dispatch_ns"]]
        if row.get("call_ns"):
            rest = row["call_ns"] - row["dispatch_ns"] - row["allocation_ns"]
            times += [row["allocation_ns"], rest, row["call_ns"]]
        rows.append((row["op"], row["arrays"], *(short(time / 1e3) for time in times)))
    parts = ("finding the plan, us", "dispatcher, us", "memory of the results, us", "launch, us", "whole call, us")
    return table(("op", "arrays", *parts[: len(rows[0]) - 2]), rows)


def tower(data: Result) -> str:
    """One request: a row for each size, a column for each way to run it."""
    ways = list(dict.fromkeys(row["variant"] for row in data["tower"]))
    times: dict[tuple[int, int], dict[str, float]] = {}
    checks: dict[tuple[int, int], tuple[str, str]] = {}
    for row in data["tower"]:
        key = row["rows"], row["items"]
        times.setdefault(key, {})[row["variant"]] = row["device_ms"]
        if row["difference"]:
            checks[key] = f"{max(row['difference'].values()):.1%}", "yes" if row["equal"] else "**no**"
    rows = [(*key, *(short(found[way]) for way in ways), *checks[key]) for key, found in times.items()]
    columns = ("patches", "images", *(f"{way}, ms" for way in ways), "output moved by", "replay equal")
    return table(columns, rows, texts=0)


def trace(rows: Sequence[Result]) -> str:
    """Requests one by one: latency, and what graphs cost."""
    lines: list[Cells] = []
    for row in rows:
        graphs = row["graphs"]
        costs = (f"{graphs['waste']:.1%}", f"{graphs['pool_bytes'] / 2**20:,.0f}") if graphs else ("-", "-")
        lines.append((row["variant"], short(row["mean_ms"]), short(row["p99_ms"]), *costs))
    return table(("way", "mean, ms", "P99, ms", "padding", "graph memory, MiB"), lines)


def parallel(rows: Sequence[Result]) -> str:
    """The same requests on one rank and on several."""
    lines = [(row["variant"], short(row["mean_ms"]), short(row["p99_ms"]), short(row["items_per_s"])) for row in rows]
    return table(("GPUs", "mean, ms", "P99, ms", "images per s"), lines)


def soak(data: Result) -> str:
    """Random batches through graphs, each compared."""
    grown = max(0, data["allocated"][1] - data["allocated"][0])
    rows = [
        ("batches, from " + f"{data['threads']} threads", f"{data['batches']:,}"),
        ("images", f"{data['items']:,}"),
        ("times that all buffers were filled with NaN in between", f"{data['poisoned']:,}"),
        ("wrong outputs", data["mismatches"]),
        ("largest difference, as a share of the norm", f"{data['worst']:.1e}"),
        ("difference allowed", f"{data['bound']:.1e}"),
        ("bytes of device memory more at the end", f"{grown:,}"),
    ]
    return table(("", "count"), rows)


def rules(data: Result) -> str:
    """Which delta rule ran in each variant, as a list."""
    found = data["delta_rule"]
    if "prefill" in found:  # of a file from before there were variants with FLA
        found = {"all": found}
    lines = []
    for variant, phases in found.items():
        lines.append(f"- {variant}: " + ", ".join(f"{phase} by `{name}`" for phase, name in phases.items()))
    return "\n".join(lines)


def layers(data: Result) -> str:
    """One Gated DeltaNet layer by its parts, a table for each phase."""
    if any("variant" not in row for row in data["layer"]):
        return _layers_without_rule(data)
    tables = []
    for phase in ("prefill", "decode"):
        rows = [row for row in data["layer"] if row["phase"] == phase]
        parts = list(dict.fromkeys(part for row in rows for part in row["parts"]))
        host = {"host_us": "host, us", "launches": "launches"} if phase == "decode" else {}
        lines: list[Cells] = []
        for row in rows:
            times = (short(row["parts"].get(part)) for part in parts)
            counts = ("-" if row[key] is None else round(row[key]) for key in host)
            variant = row["variant"] if row["captured"] else f"{row['variant']}, not captured"
            lines.append((size_of(row), variant, short(row["us"]), *times, *counts))
        columns = ("one layer", "", "all, us", *(f"{part}, us" for part in parts), *host.values())
        tables.append(table(columns, lines, texts=2))
    return "\n\n".join(tables)


def _layers_without_rule(data: Result) -> str:
    """The same of a file from before the delta rule was one of the parts."""
    rows = [
        (size_of(row), *(short(row[key]) for key in ("untouched_us", "accelerated_us", "delta_rule_us")))
        for row in data["layer"]
    ]
    return table(("one layer without its delta rule", "untouched, us", "accelerated, us", "the delta rule, us"), rows)


def whole_model(data: Result) -> str:
    """Whole calls: the best that a user had before, each accelerated variant over it, and all untouched ones."""
    before, after = variants_of(data["rows"])
    others = before if len(before) > 1 else []
    lines: list[Cells] = []
    for call in compare(data["rows"]):
        best = call.before
        cells = [best or "-", short(call.ms[best] if best else None)]
        for variant in after:
            gain = call.gain(variant)
            cells += [short(call.ms.get(variant)), f"{gain:.2f}x" if gain else "-"]
        lines.append((call.size, call.call["mode"], *cells, *(short(call.ms.get(name)) for name in others)))
    gains = [heading for variant in after for heading in (f"{variant}, ms", "gain")]
    columns = ("whole model", "mode", "best before", "ms", *gains, *(f"{name}, ms" for name in others))
    return table(columns, lines, texts=3)


def conv(data: Result) -> str:
    """From the projection to the delta rule, in one pass and as Transformers does it."""
    ways = list(dict.fromkeys(row["variant"] for row in data["conv"]))
    times: dict[int, dict[str, float]] = {}
    for row in data["conv"]:
        times.setdefault(row["tokens"], {})[row["variant"]] = row["us"]
    rows = [(f"{tokens:,}", *(short(found.get(way)) for way in ways)) for tokens, found in times.items()]
    return table(("tokens", *(f"{way}, us" for way in ways)), rows, texts=0)


def conformance(results: Mapping[str, Result]) -> str:
    """Cases passed by each backend in the last report on an op that it is in, and all of them."""
    reports = {name: data for name, data in results.items() if name.startswith("conformance_")}
    counted: dict[str, dict[str, dict[str, int]]] = {}
    for data in sorted(reports.values(), key=lambda data: data["finished"]):
        found: dict[tuple[str, str], dict[str, int]] = {}
        for row in data["results"]:
            status = found.setdefault((row["op"], row["backend"]), {})
            status[row["status"]] = status.get(row["status"], 0) + 1
        for (op, backend), status in found.items():
            counted.setdefault(op, {})[backend] = status
    backends = sorted({name for found in counted.values() for name in found})

    def total(status: str) -> int:
        return sum(found.get(status, 0) for of_op in counted.values() for found in of_op.values())

    rows = [
        (op, *(found.get(name, {}).get("passed", "-") for name in backends)) for op, found in sorted(counted.items())
    ]
    summary = f"{total('passed'):,} passed, {total('failed')} failed, {total('skipped')} skipped."
    made = "\n".join(f"- {caption(name, data)}" for name, data in reports.items())
    return f"{table(('cases passed', *backends), rows)}\n\n{summary}\n\n{made}"


def sanitizer(data: Result) -> str:
    """Cases that passed under each tool of compute-sanitizer, and what it reported."""
    runs = {(one["op"], one["tool"]): f"{one['cases']['passed']} / {one['reports']}" for one in data["runs"]}
    tools = list(dict.fromkeys(tool for _, tool in runs))
    names = sorted({op for op, _ in runs})
    return table(
        ("cases passed / reports", *tools), ((op, *(runs.get((op, tool), "-") for tool in tools)) for op in names)
    )


def main() -> None:
    """Write docs/benchmarks.md of the checkout that this is run in."""
    Path("docs/benchmarks.md").write_text(render(Path("benchmarks")), encoding="utf-8")


if __name__ == "__main__":
    main()
