"""`polyfuse bench model`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from polyfuse.cli._device import default_device
from polyfuse.cli._options import device_option, out_option, tiny_option
from polyfuse.cli._terminal import console

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
@click.option("--fp8", is_flag=True, help="Give the dense MLPs and shared experts FP8 weights.")
@click.option("--no-compile", is_flag=True, help="Leave out the comparison with a conv under torch.compile.")
@device_option
@tiny_option
@out_option
def command(
    model: str,
    layers: int,
    prefill: tuple[int, ...],
    decode: tuple[int, ...],
    fp8: bool,
    no_compile: bool,
    device: str | None,
    tiny: bool,
    out: Path | None,
) -> None:
    """Measure a text model with Gated DeltaNet layers of real sizes, untouched and accelerated: prefill and decode.

    \b
    Example:
      polyfuse bench model --model qwen3_5 --out benchmarks/results
    """
    from polyfuse.bench.model import ModelBench, run_model_bench
    from polyfuse.bench.subjects.text import TextModel

    screen, device = console(), device or default_device()

    def show(result: ModelBench) -> None:
        if out:  # what a killed run leaves behind
            result.write(out)

    with screen.status("measuring"):
        subject = TextModel(model, device, tiny, layers, fp8)
        result = run_model_bench(subject, prefill, decode, not no_compile, show)
    for table in _tables(result):
        screen.print(table)
    for note in result.notes:
        screen.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    if out:
        screen.print(f"written: {result.write(out)}", soft_wrap=True)


def _tables(result: "ModelBench") -> Iterator[Table]:
    """One table for each part that was measured."""
    fp8 = ", FP8 MLPs" if result.fp8 else ""
    title = f"{result.sizes}, {result.layers} layers, {result.dtype}{fp8}, on {result.device}"
    if result.strategies:
        yield _strategies_table(result, title)
    if result.conv:
        table = Table("tokens", "", "us", "of one pass", title=f"Conv to delta rule: {title}")
        for row in result.conv:
            table.add_row(f"{row.tokens}", row.variant, f"{row.us:.1f}", f"{row.ratio:.2f}x")
        yield table
    if result.layer:
        yield _layer_table(result, title)
    if result.rows:
        yield _whole_table(result, title)


def _strategies_table(result: "ModelBench", title: str) -> Table:
    from polyfuse.bench.model.strategies import NAMED

    table = Table("rows", "", "auto", *NAMED, title=f"gdn_in_proj, us a call: {title}")
    for row in result.strategies:
        times = (f"{row.us[name]:.1f}" if name in row.us else "-" for name in NAMED)
        table.add_row(f"{row.rows}", "captured" if row.captured else "eager", row.chosen, *times)
    return table


def _layer_table(result: "ModelBench", title: str) -> Table:
    columns = "", "batch", "tokens", "part", "untouched us", "accelerated us", "saved", "share"
    table = Table(*columns, title=f"One layer without its delta rule: {title}")
    for row in result.layer:
        call = row.phase, f"{row.batch}", f"{row.tokens}"
        whole = row.untouched_us, row.accelerated_us, row.untouched_us - row.accelerated_us
        table.add_row(*call, "all", *(f"{us:.1f}" for us in whole), "100%")
        for part in row.parts:
            times = part.untouched_us, part.accelerated_us, part.saved_us
            table.add_row(*call, part.part, *(f"{us:.1f}" for us in times), f"{part.share:.0%}")
        table.add_row(*call, "delta rule (wall)", f"{row.delta_rule_us:.1f}")
    return table


def _whole_table(result: "ModelBench", title: str) -> Table:
    ran = ", ".join(f"{phase} by {name}" for phase, name in result.delta_rule.items())
    columns = "", "batch", "context", "mode", "tokens", "variant", "ms", "tokens/s", "speed-up"
    table = Table(*columns, title=f"Whole model: {title}", caption=f"delta rule: {ran}")
    untouched_ms = 0.0  # of the same call, whose row comes first
    for row in result.rows:
        if row.variant == "untouched":
            untouched_ms = row.ms
        call = row.phase, f"{row.batch}", f"{row.context}", row.mode, f"{row.tokens}", row.variant
        table.add_row(*call, f"{row.ms:.2f}", f"{row.tokens_per_s:.0f}", f"{untouched_ms / row.ms:.2f}x")
    return table
