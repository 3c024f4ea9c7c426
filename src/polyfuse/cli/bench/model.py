"""`polyfuse bench model`."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from polyfuse.cli._device import default_device
from polyfuse.cli._options import device_option, out_option, tiny_option
from polyfuse.cli._terminal import activity, console

if TYPE_CHECKING:
    from polyfuse.bench.model import ModelBench

count = click.IntRange(min=1)


@click.command()
@click.option(
    "--model",
    type=click.Choice(["qwen3_next", "qwen3_5", "qwen3_5_moe"]),
    default="qwen3_5",
    show_default=True,
    help="Its weights are random.",
)
@click.option("--layers", type=click.IntRange(min=4), default=4, show_default=True, help="Every fourth is attention.")
@click.option("--prefill", multiple=True, type=count, help="Tokens of a prompt; repeat for several.")
@click.option("--decode", multiple=True, type=count, help="Sequences that get one token each; repeat for several.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(["rows", "layer", "strategies", "conv"]),
    help="rows are whole models, layer is one by its parts; repeat for several. Default: all.",
)
@click.option("--fp8", is_flag=True, help="Give MLPs, shared experts and experts FP8 weights.")
@click.option("--no-compile", is_flag=True, help="Leave out the comparison with a conv under torch.compile.")
@device_option
@tiny_option
@out_option
def command(
    model: str,
    layers: int,
    prefill: tuple[int, ...],
    decode: tuple[int, ...],
    parts: tuple[str, ...],
    fp8: bool,
    no_compile: bool,
    device: str | None,
    tiny: bool,
    out: Path | None,
) -> None:
    """Measure a text model with Gated DeltaNet layers of real sizes: prefill and decode, untouched and accelerated.

    Both are measured with Transformers' or Polyfuse's own delta rule and, where it is installed, with that of
    flash-linear-attention. Gains are over the fastest untouched one: the best that a user had before.

    \b
    Example:
      polyfuse bench model --model qwen3_5 --out benchmarks/results
    """
    from polyfuse.bench.model import PARTS, run_model_bench
    from polyfuse.bench.subjects.text import TextModel

    screen, device = console(), device or default_device()

    def show(result: "ModelBench", row: object) -> None:
        screen.print(escape(str(row)), soft_wrap=True)
        if out:  # what a killed run leaves behind
            result.write(out)

    with activity(screen, "making the model") as shown:
        subject = TextModel(model, device, tiny, layers, fp8)
        result = run_model_bench(subject, prefill, decode, not no_compile, parts or PARTS, show, shown.update)
    for table in _tables(result):
        screen.print(table)
    for variant, rules in result.delta_rule.items():
        ran = ", ".join(f"{phase} by {name}" for phase, name in rules.items())
        screen.print(f"delta rule, {variant}: {ran}", soft_wrap=True)
    for note in result.notes:
        screen.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    if out:
        screen.print(f"written: {result.write(out)}", soft_wrap=True)


def _tables(result: "ModelBench") -> Iterator[Table]:
    """One table for each part that was measured."""
    fp8 = ", FP8 weights" if result.fp8 else ""
    title = f"{result.sizes}, {result.layers} layers, {result.dtype}{fp8}, on {result.device}"
    if result.rows:
        yield _whole_table(result, title)
    for phase in ("prefill", "decode"):
        if rows := [asdict(row) for row in result.layer if row.phase == phase]:
            yield _layer_table(rows, f"One layer, us, {phase}: {title}")
    if result.strategies:
        yield _strategies_table(result, title)
    if result.conv:
        table = Table("tokens", "", "us", "of one pass", title=f"Conv to delta rule: {title}")
        for row in result.conv:
            table.add_row(f"{row.tokens}", row.variant, f"{row.us:.1f}", f"{row.ratio:.2f}x")
        yield table


def _whole_table(result: "ModelBench", title: str) -> Table:
    """A row for each call: the best that a user had before, then what is accelerated, then all that is not."""
    from polyfuse.bench.baseline import compare, variants_of

    rows = [asdict(row) for row in result.rows]
    before, after = variants_of(rows)
    headings = [heading for variant in after for heading in (f"{variant}, ms", "gain")]
    others = before if len(before) > 1 else []
    columns = "whole model", "mode", "best before", "ms", *headings, *(f"{variant}, ms" for variant in others)
    table = Table(*columns, title=f"Whole model: {title}")
    for call in compare(rows):
        cells: list[str] = []
        for variant in after:
            gain = call.gain(variant)
            cells += [_number(call.ms.get(variant)), f"{gain:.2f}x" if gain else "-"]
        best = call.before or "-", _number(call.ms[call.before] if call.before else None)
        table.add_row(call.size, call.call["mode"], *best, *cells, *(_number(call.ms.get(name)) for name in others))
    return table


def _layer_table(rows: list[dict[str, Any]], title: str) -> Table:
    """A row for each call and variant: the whole layer, and its parts."""
    from polyfuse.bench.baseline import size_of

    parts = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    host = ["host", "launches"] if rows[0]["phase"] == "decode" else []
    table = Table("", "variant", "captured", "all", *parts, *host, title=title)
    for row in rows:
        cells = [_number(row["parts"].get(part), 1) for part in parts]
        if host:
            cells += [_number(row["host_us"], 1), _number(row["launches"], 0)]
        captured = "yes" if row["captured"] else "no"
        table.add_row(size_of(row), row["variant"], captured, _number(row["us"], 1), *cells)
    return table


def _strategies_table(result: "ModelBench", title: str) -> Table:
    from polyfuse.bench.model.strategies import NAMED

    table = Table("rows", "", "auto", *NAMED, title=f"gdn_in_proj, us a call: {title}")
    for row in result.strategies:
        times = (f"{row.us[name]:.1f}" if name in row.us else "-" for name in NAMED)
        table.add_row(f"{row.rows}", "captured" if row.captured else "eager", row.chosen, *times)
    return table


def _number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"
