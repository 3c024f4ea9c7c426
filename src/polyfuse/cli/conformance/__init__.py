"""`polyfuse conformance`: without a subcommand it runs the cases."""

import shlex
import sys
from functools import partial
from pathlib import Path

import click

from polyfuse.cli._conformance import INTERRUPTED, run_conformance
from polyfuse.cli._device import chosen_device
from polyfuse.cli._group import ModuleGroup
from polyfuse.cli._options import backends_option, check_backends, device_option, known_ops, ops_option
from polyfuse.cli._terminal import activity, console

LIMIT = click.FloatRange(min=0, min_open=True)


@click.group(cls=ModuleGroup, package=__name__, invoke_without_command=True)
@ops_option
@backends_option
@click.option("--case", "only", multiple=True, help="Only this case, whatever the level; * and ? fit; may be repeated.")
@click.option("--level", "--profile", "level", default="standard", show_default=True, help="quick, standard or full.")
@device_option
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE:OBJECT", help="A Backend object to register first.")
@click.option(
    "-j", "workers", type=click.IntRange(min=0), metavar="N",
    help="Worker processes; 0 runs the cases in this one, for debuggers. Default: one per core up to 4, or per GPU.",
)  # fmt: skip
@click.option("--time-limit", type=LIMIT, metavar="S", help="Seconds for a case on a backend. Default: the level's.")
@click.option("--memory-limit", type=LIMIT, metavar="GIB", help="Memory that a case may take. Default: the level's.")
@click.option("--self-test", is_flag=True, help="Run wrong backends instead, all to be rejected.")
@click.option("--report", type=click.Path(file_okay=False, path_type=Path), help="Folder for the files of the report.")
@click.pass_context
def command(
    ctx: click.Context,
    op_names: tuple[str, ...],
    backends: tuple[str, ...],
    only: tuple[str, ...],
    level: str,
    device: str | None,
    plugins: tuple[str, ...],
    workers: int | None,
    time_limit: float | None,
    memory_limit: float | None,
    self_test: bool,
    report: Path | None,
) -> None:
    """Compare backends with the oracle.

    Exit status 0 if something ran and nothing failed; 1 if not; 130 if Ctrl-C or SIGTERM has ended it; 2 for a wrong
    option.

    \b
    Example:
      polyfuse conformance --op pos_embed_interpolate --backend torch --backend triton --report report
      polyfuse conformance --op gdn_post_conv --backend triton --case rows_67 -j 0
      polyfuse conformance --self-test
    """
    if ctx.invoked_subcommand is not None:
        return
    from polyfuse.conformance.tasks import register

    op_names = known_ops(op_names)
    if self_test:
        from polyfuse.conformance import selftest

        out = console()
        with activity(out, "running wrong backends"):
            rejected = selftest.run(partial(out.print, markup=False, soft_wrap=True), ops=op_names or None)
        sys.exit(0 if rejected else 1)
    register(plugins)
    device = chosen_device(device, check_backends(backends))
    options = {"level": level, "device": device, "only": only, "workers": workers, "plugins": plugins}
    limits = {"time_limit": time_limit, "memory_limit": memory_limit}
    line = shlex.join(["polyfuse", *sys.argv[1:]])
    try:
        status = run_conformance(
            console(), report, ops=op_names or None, backends=backends or None, **options, **limits, command=line
        )
    except KeyboardInterrupt:  # before the first case
        status = INTERRUPTED
    sys.exit(status)
