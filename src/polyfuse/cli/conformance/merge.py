"""`polyfuse conformance merge`."""

from pathlib import Path

import click


@click.command()
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("reports", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path))
def command(out: Path, reports: tuple[Path, ...]) -> None:
    """Make one report of several that have other ops or backends of one run, or another file of one report.

    OUT ends in .json, .html, .md or .xml (JUnit). The reports must agree on device, level, commit and versions.

    \b
    Example:
      polyfuse conformance merge report.json torch/conformance.json triton/conformance.json
      polyfuse conformance merge report.html report.json
    """
    from polyfuse.conformance.report import merge, read

    click.echo(f"written: {merge([read(path) for path in reports]).write_file(out)}")
