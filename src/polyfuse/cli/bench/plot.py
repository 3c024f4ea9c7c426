"""`polyfuse bench plot`."""

from pathlib import Path

import click

from polyfuse.cli._terminal import console


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for the figures.")
@click.option("--format", "kind", type=click.Choice(["svg", "png"]), default="svg", show_default=True)
def command(files: tuple[Path, ...], out: Path, kind: str) -> None:
    """Draw the results in each of FILES, which `polyfuse bench`, `bench encoder` or `bench model` wrote.

    \b
    Example:
      polyfuse bench plot benchmarks/results/model_qwen3_5_h200.json --out benchmarks/plots
    """
    from polyfuse.bench.plots import plot

    for path in files:
        for figure in plot(path, out, kind):
            console().print(f"written: {figure}", soft_wrap=True)
