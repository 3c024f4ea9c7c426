"""`polyfuse bench model`."""

from pathlib import Path

import click
from rich.markup import escape

from polyfuse.cli._device import default_device
from polyfuse.cli._options import device_option, out_option, tiny_option
from polyfuse.cli._terminal import console

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
    from polyfuse.bench.text_models import TextModel

    screen, device = console(), device or default_device()

    def show(result: ModelBench) -> None:
        if out:  # what a killed run leaves behind
            result.write(out)

    with screen.status("measuring"):
        subject = TextModel(model, device, tiny, layers, fp8)
        result = run_model_bench(subject, prefill, decode, not no_compile, show)
    for table in result.tables():
        screen.print(table)
    for note in result.notes:
        screen.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    if out:
        screen.print(f"written: {result.write(out)}", soft_wrap=True)
