"""`polyfuse conformance`: without a subcommand it runs the cases."""

import importlib
import sys
from pathlib import Path

import click

from polyfuse.cli._conformance import run_conformance
from polyfuse.cli._device import chosen_device
from polyfuse.cli._group import ModuleGroup
from polyfuse.cli._options import backends_option, check_backends, device_option, known_ops, ops_option
from polyfuse.cli._terminal import console
from polyfuse.spec import BackendError


@click.group(cls=ModuleGroup, package=__name__, invoke_without_command=True)
@ops_option
@backends_option
@click.option("--profile", default="standard", show_default=True, help="quick, standard or full.")
@device_option
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE:OBJECT", help="A Backend object to register first.")
@click.option("--report", type=click.Path(file_okay=False, path_type=Path), help="Folder for the JSON and JUnit files.")
@click.pass_context
def command(
    ctx: click.Context,
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
    if ctx.invoked_subcommand is not None:
        return
    op_names = known_ops(op_names)
    for plugin in plugins:
        _register(plugin)
    device = chosen_device(device, check_backends(backends))
    ok = run_conformance(console(), op_names, backends, profile, device, report)
    sys.exit(0 if ok else 1)


def _register(plugin: str) -> None:
    """Add the backend that a MODULE:OBJECT names to the registry. Raises `BackendError` if it names none."""
    from polyfuse.dispatch import Backend, registry

    module, _, name = plugin.partition(":")
    try:
        backend = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BackendError(f"--plugin: expected an importable MODULE:OBJECT, got {plugin!r} ({error})") from error
    if not isinstance(backend, Backend):
        raise BackendError(f"--plugin: {plugin} is not a polyfuse.dispatch.Backend but {type(backend).__name__}")
    registry().add(backend)
