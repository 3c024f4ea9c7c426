"""`polyfuse bench`: what it measures without a subcommand is the ops."""

from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from polyfuse.cli._device import chosen_device
from polyfuse.cli._group import ModuleGroup
from polyfuse.cli._options import backends_option, check_backends, device_option, known_ops, ops_option, out_option
from polyfuse.cli._terminal import activity, console


@click.group(cls=ModuleGroup, package=__name__, invoke_without_command=True)
@ops_option
@backends_option
@device_option
@click.option("--model", default=None, help="Only the cases of this model file.")
@click.option("--no-compile", is_flag=True, help="Leave out the comparison with torch.compile.")
@out_option
@click.pass_context
def command(
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
    import torch

    from polyfuse.bench.declined import declined
    from polyfuse.bench.ops import Bench, Row, run_bench
    from polyfuse.dispatch import device_of

    op_names = known_ops(op_names)
    check_backends(backends)
    device = chosen_device(device, ["torch"])
    screen = console()

    def show(result: Bench, row: Row) -> None:
        status.update(f"{row.op} {row.case} {row.backend}")
        if out:
            result.write(out)

    with activity(screen, "measuring") as status:
        result = run_bench(op_names, backends, device, model, not no_compile, show)
    columns = ("op", "model", "case", "backend", "device us", "host us", "GB/s", "of ceiling", "vs eager", "vs compile")
    table = Table(*columns, title=f"{result.device}, stream ceiling {result.ceiling_gb_s:.0f} GB/s")
    for r in result.rows:
        ratios = ("-" if x is None else f"{x:.2f}x" for x in (r.eager_ratio, r.compile_ratio))
        numbers = (f"{r.device_us:.2f}", f"{r.host_us:.1f}", f"{r.gigabytes_per_s:.0f}", f"{r.fraction:.1%}")
        table.add_row(r.op, r.model, r.case, r.backend, *numbers, *ratios)
    screen.print(table)
    where = device_of(torch.empty(0, device=device), "torch")
    found = [case for case in declined(where, model=model) if not op_names or case.op in op_names]
    for case in found:
        screen.print(f"[bold red]falls through[/] on {where.kind}: {escape(str(case))}", soft_wrap=True)
    if not found:
        screen.print(f"no case falls through: the first backend for {where.kind} declines none")
    if out:
        screen.print(f"written: {result.write(out)}")
