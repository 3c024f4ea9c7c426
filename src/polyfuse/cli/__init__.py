"""`polyfuse`: the command line. Every error of ours is one line on stderr and exit status 2."""

import importlib
import json
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import polyfuse
from polyfuse.cli._terminal import console, default_device, progress
from polyfuse.cli.bench.dispatch import bench_dispatch
from polyfuse.cli.bench.encoder import bench_encoder, soak
from polyfuse.cli.bench.model import bench_model, bench_plot
from polyfuse.conformance import cases
from polyfuse.spec import OPS, REQUIRED, BackendError, SpecError, Unsupported, op_page

SAVE_EVERY = 100  # results
STATUS_STYLE = {"passed": "green", "failed": "bold red", "waived": "magenta", "skipped": "yellow"}


class _Group(click.Group):
    """Reports the library's own errors as the command line's."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (SpecError, Unsupported, BackendError) as error:
            raise click.UsageError(str(error)) from error
        except ModuleNotFoundError as error:
            raise click.UsageError(f"this command needs {error.name}; try: pip install 'polyfuse[all]'") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(polyfuse.__version__, prog_name="polyfuse")
def main() -> None:
    """Fused ops for vision-language and hybrid-attention models, one spec and many backends.

    \b
    Example:
      polyfuse info
    """


@main.command()
def info() -> None:
    """Show the platform and, for every backend, whether it can run here.

    \b
    Example:
      polyfuse info
    """
    from polyfuse.conformance import versions
    from polyfuse.dispatch import registry

    out, device = console(), default_device()
    out.print(f"device: {device}   " + "   ".join(f"{k} {v}" for k, v in versions().items()), soft_wrap=True)
    table = Table("backend", "arrays", "from", *OPS, title="Backends")
    broken: dict[tuple[str, str], list[str]] = {}  # a backend and a traceback to ops
    for name in registry().names():
        try:
            backend = registry().get(name)
        except BackendError:
            continue
        verdicts = []
        for op in OPS:
            try:
                missing = backend.missing(op)
                if missing is not None:
                    why = "not implemented" if missing[0] == "not_implemented" else missing[1]
                    verdicts.append(f"[yellow]{escape(why)}[/]")
                    continue
                emulated = device in backend.load(op).capability.interpreted
                verdicts.append("[green]available[/]" + (", interpreted" if emulated else ""))
            except BackendError as error:
                verdicts.append("[red]broken, see below[/]")
                broken.setdefault((name, "".join(traceback.format_exception(error.__cause__ or error))), []).append(op)
        table.add_row(name, backend.family, escape(backend.origin), *verdicts)
    out.print(table)
    for name, text in registry().problems:
        out.print(f"[red]backend {escape(name)} cannot be used:[/] {escape(text)}")
    for (name, text), names in broken.items():
        out.print(f"[red]backend {escape(name)} cannot run {', '.join(names)}:[/] {escape(text)}")


@main.command()
@click.argument("op", required=False)
def ops(op: str | None) -> None:
    """List the ops and their options, or print OP's whole definition as Markdown.

    \b
    Example:
      polyfuse ops pos_embed_interpolate
    """
    from polyfuse.dispatch._select import check_op

    if op is not None:
        check_op(op)
        click.echo(op_page(OPS[op]), nl=False)
        return
    table = Table("op", "spec", "what it does", "options")
    for spec in OPS.values():
        options = "\n".join(a.name if a.default is REQUIRED else f"{a.name}={a.default!r}" for a in spec.attrs)
        table.add_row(spec.name, f"v{spec.version}", spec.summary, escape(options))
    console().print(table)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def matrix(as_json: bool) -> None:
    """Print what every backend claims to run, as a Markdown table. Conformance tests the claims both ways.

    \b
    Example:
      polyfuse matrix --json
    """
    from polyfuse.dispatch._matrix import as_markdown, support_matrix

    rows = support_matrix()
    click.echo(json.dumps([asdict(row) for row in rows], indent=1) if as_json else as_markdown(rows), nl=as_json)


@main.command()
@click.argument("op")
@click.option("--family", default="torch", show_default=True, help="Kind of arrays: torch, jax or numpy.")
@click.option(
    "--device", default=None, help="Device of the arrays, such as cpu or cuda; the accelerator if there is one."
)
@click.option("--json", "as_json", is_flag=True, help="Print the decision as JSON.")
def explain(op: str, family: str, device: str | None, as_json: bool) -> None:
    """Show which backend runs OP here, why each other one does not, and where the preference came from.

    \b
    Example:
      POLYFUSE_BACKEND=triton polyfuse explain pos_embed_interpolate
    """
    from polyfuse.conformance import make_inputs, place
    from polyfuse.dispatch._arrays import FAMILIES
    from polyfuse.dispatch._select import check_op

    check_op(op)
    if family not in FAMILIES:
        raise SpecError(f"--family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    device = _device(device, [family])
    spec = OPS[op]
    values = make_inputs(spec, cases(spec.name)[0])
    decision = polyfuse.explain(op, **place(values, family, device))
    if as_json:
        click.echo(json.dumps(decision.as_dict(), indent=1))
        return
    title = f"{op} on {decision.device}, {family} arrays: {decision.winner or 'no backend'}"
    names = ", ".join(decision.preference.names)
    table = Table(
        "backend", "verdict", "why", title=title, caption=f"preference: {names}  from {decision.preference.source}"
    )
    for c in decision.candidates:
        style = "bold green" if c.status == "chosen" else ""
        table.add_row(c.name, c.status, escape(c.reason), style=style)
    console().print(table)


@main.command()
@click.option("--op", "op_names", multiple=True, help="An op; repeat for several. Default: all.")
@click.option("--backend", "backends", multiple=True, help="A backend; repeat for several. Default: all.")
@click.option("--profile", default="standard", show_default=True, help="quick, standard or full.")
@click.option("--device", default=None, help="cpu, cuda, ...; the accelerator if there is one.")
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE:OBJECT", help="A Backend object to register first.")
@click.option("--report", type=click.Path(file_okay=False, path_type=Path), help="Folder for the JSON and JUnit files.")
def conformance(
    op_names: tuple[str, ...],
    backends: tuple[str, ...],
    profile: str,
    device: str | None,
    plugins: tuple[str, ...],
    report: Path | None,
) -> None:
    """Prove backends against the oracle. Exit status 0 if something ran and nothing failed, else 1.

    \b
    Example:
      polyfuse conformance --op pos_embed_interpolate --backend torch --backend triton --report report
    """
    from polyfuse.dispatch._select import check_op

    for op in op_names:
        check_op(op)
    for plugin in plugins:
        _register(plugin)
    from polyfuse.dispatch import registry

    device = _device(device, [registry().get(name).family for name in backends])
    ok = run_conformance(console(), op_names, backends, profile, device, report)
    sys.exit(0 if ok else 1)


def _device(device: str | None, families: Sequence[str] = ()) -> str:
    """The device given, or the default one. Raises `SpecError` for one that this machine lacks."""
    from polyfuse.dispatch import check_device

    device = device or default_device()
    check_device("--device", device, families)
    return device


def _register(plugin: str) -> None:
    from polyfuse.dispatch import Backend, registry

    module, _, name = plugin.partition(":")
    try:
        backend = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BackendError(f"--plugin: expected an importable MODULE:OBJECT, got {plugin!r} ({error})") from error
    if not isinstance(backend, Backend):
        raise BackendError(f"--plugin: {plugin} is not a polyfuse.dispatch.Backend but {type(backend).__name__}")
    registry().add(backend)


def run_conformance(
    out: Console,
    op_names: tuple[str, ...],
    backends: tuple[str, ...],
    profile: str,
    device: str,
    folder: Path | None,
) -> bool:
    """Run conformance with a live progress bar, print the matrix and every failure; write the report as it grows."""
    from polyfuse import conformance as suite

    with progress(out) as bar:
        task = bar.add_task("conformance", total=None)

        def show(so_far: suite.Report, total: int) -> None:
            latest = so_far.results[-1]
            bar.update(task, advance=1, total=total, description=f"{latest.op} {latest.backend}")
            if folder and len(so_far.results) % SAVE_EVERY == 0:  # what a killed run leaves behind
                so_far.write(folder)

        report = suite.run(op_names or None, backends or None, profile=profile, device=device, on_result=show)
    names = list(dict.fromkeys(r.backend for r in report.results))
    ran = list(dict.fromkeys(r.op for r in report.results))
    table = Table("op", *names, title=f"Conformance on {report.device}, profile {profile}, seed {report.seed}")
    for op in ran:
        table.add_row(op, *(_cell(report.counts(op, name)) for name in names))
    out.print(table)
    for r in report.results:
        if r.status == "failed":
            out.print(f"[bold red]failed[/] {r.op} {r.backend} {r.case}: {escape(r.detail)}", soft_wrap=True)
        if r.status == "waived":
            out.print(f"[magenta]waived[/] {r.op} {r.backend} {r.case}: {escape(r.detail)}", soft_wrap=True)
    reasons = {(r.backend, r.detail) for r in report.results if r.status == "skipped"}
    for name, reason in sorted(reasons):
        cases = sum(r.backend == name and r.detail == reason for r in report.results)
        out.print(f"[yellow]skipped[/] {name}: {cases} cases: {escape(reason)}", soft_wrap=True)
    for name in names:
        out.print(f"{name}: {len(report.conformant(name))} of {len(ran)} ops conformant")
    counts = report.counts()
    out.print(", ".join(f"{counts[s]} {s}" for s in STATUS_STYLE))
    if folder:
        out.print("written: " + ", ".join(map(str, report.write(folder))), soft_wrap=True)
    return report.ok


def _cell(counts: dict[str, int]) -> str:
    return " ".join(f"[{style}]{counts[s]} {s}[/]" for s, style in STATUS_STYLE.items() if counts[s]) or "-"


@main.group(invoke_without_command=True)
@click.option("--op", "op_names", multiple=True, help="An op; repeat for several. Default: all.")
@click.option("--backend", "backends", multiple=True, help="A backend; repeat for several. Default: all.")
@click.option("--device", default=None, help="cpu, cuda, ...; the accelerator if there is one.")
@click.option("--model", default=None, help="Only the cases of this model file.")
@click.option("--no-compile", is_flag=True, help="Leave out the comparison with torch.compile.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the JSON file.")
@click.pass_context
def bench(
    ctx: click.Context,
    op_names: tuple[str, ...],
    backends: tuple[str, ...],
    device: str | None,
    model: str | None,
    no_compile: bool,
    out: Path | None,
) -> None:
    """Measure the ops' time per call on real-model shapes, as a fraction of the device's own stream ceiling.

    \b
    Example:
      polyfuse bench --op silu_mul_block_quant --backend triton --out benchmarks/results
    """
    if ctx.invoked_subcommand is not None:
        return
    from polyfuse.bench.ops import Bench, Row, run_bench
    from polyfuse.dispatch import registry
    from polyfuse.dispatch._select import check_op

    for op in op_names:
        check_op(op)
    for name in backends:
        registry().get(name)
    device = _device(device, ["torch"])
    screen = console()

    def show(result: Bench, row: Row) -> None:
        status.update(f"{row.op} {row.case} {row.backend}")
        if out:
            result.write(out)

    with screen.status("measuring") as status:
        result = run_bench(op_names, backends, device, model, not no_compile, show)
    columns = ("op", "model", "case", "backend", "device us", "host us", "GB/s", "of ceiling", "vs eager", "vs compile")
    table = Table(*columns, title=f"{result.device}, stream ceiling {result.ceiling_gb_s:.0f} GB/s")
    for r in result.rows:
        ratios = ("-" if x is None else f"{x:.2f}x" for x in (r.eager_ratio, r.compile_ratio))
        numbers = (f"{r.device_us:.2f}", f"{r.host_us:.1f}", f"{r.gigabytes_per_s:.0f}", f"{r.fraction:.1%}")
        table.add_row(r.op, r.model, r.case, r.backend, *numbers, *ratios)
    screen.print(table)
    if out:
        screen.print(f"written: {result.write(out)}")


for command in (bench_dispatch, bench_encoder, bench_model, bench_plot):
    bench.add_command(command)
main.add_command(soak)


@main.command("new-backend")
@click.argument("name")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Folder to write. Default: polyfuse-NAME.")
@click.option("--family", default="torch", show_default=True, help="Kind of arrays: torch, jax or numpy.")
def new_backend(name: str, folder: Path | None, family: str) -> None:
    """Write a package for a backend NAME of your own, with a stub for every op.

    \b
    Example:
      polyfuse new-backend mychip --dir polyfuse-mychip
    """
    from polyfuse.cli import _new_backend as package

    folder = folder or Path(f"polyfuse-{name}")
    for path in package.new_backend(name, folder, family):
        click.echo(f"created {path}")
    click.echo("next:")
    click.echo(f"  cd {shlex.quote(str(folder))} && python -m pip install --editable '.[test]'")
    click.echo(f"  polyfuse conformance --backend {name} --profile quick")
    click.echo("  python -m pytest")


@main.command()
@click.option("--fast", is_flag=True, help="Use a tiny tower instead of the real one.")
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("report"),
    show_default=True,
    help="Folder for the conformance report.",
)
def demo(fast: bool, report: Path) -> None:
    """Run real photos through the Qwen3-VL vision tower, untouched and accelerated, then prove every backend.

    \b
    Example:
      polyfuse demo --fast
    """
    out, device = console(), default_device()
    from polyfuse.cli._demo import run_demo

    status = run_demo(fast, out, device)
    ok = run_conformance(out, (), (), "quick", device, report)
    sys.exit(status or (0 if ok else 1))
