"""The tables of `polyfuse bench`."""

from collections.abc import Sequence

from rich.table import Table

from polyfuse.bench.rows import Bench, PeerRow


def ops_table(result: Bench) -> Table:
    """A row for each case and backend."""
    numbers = "device us", "cold us", "host us", "GB/s", "of ceiling", "vs eager", "vs compile"
    title = f"{result.device}, stream ceiling {result.ceiling_gb_s:.0f} GB/s"
    table = _table(("op", "model", "case", "backend"), numbers, title)
    for r in result.rows:
        times = _number(r.device_us), _number(r.cold_us), f"{r.host_us:.1f}"
        stream = f"{r.gigabytes_per_s:.0f}", f"{r.fraction:.1%}"
        table.add_row(r.op, r.model, r.case, r.backend, *times, *stream, ratio(r.eager_ratio), ratio(r.compile_ratio))
    return table


def peers_table(result: Bench) -> Table:
    """A row for each case and peer: its times, and those of ours that they are compared with."""
    numbers = "device us", "cold us", "ours", "device us", "peer / ours", "cold"
    texts = "op", "case", "peer", "version", "results"
    table = _table(texts, numbers, f"Peers on the same inputs, {result.device}")
    ours = {(row.op, row.model, row.case, row.backend): row.device_us for row in result.rows}
    for r in result.peers:
        times = _marked(r, r.device_us), _marked(r, r.cold_us)
        own = ours.get((r.op, r.model, r.case, r.ours or ""))
        ratios = ratio(r.ratio), ratio(r.cold_ratio)
        case = f"{r.case} of {r.model}"
        table.add_row(r.op, case, r.peer, r.version, r.status, *times, r.ours or "-", _number(own), *ratios)
    return table


def _table(texts: Sequence[str], numbers: Sequence[str], title: str) -> Table:
    """An empty table whose texts go on in further lines where they are too long: a name is never cut."""
    table = Table(title=title)
    for text in texts:
        table.add_column(text, overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right")
    return table


def ratio(value: float | None) -> str:
    """How many times, or a dash for none."""
    return "-" if value is None else f"{value:.2f}x"


def _marked(row: PeerRow, value: float | None) -> str:
    """A time, in brackets if it is one of wrong results."""
    text = _number(value)
    return f"({text})" if row.status == "wrong" and value is not None else text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
