"""`polyfuse doctor`."""

import os
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from polyfuse.cli._backends import verdicts
from polyfuse.cli._device import default_device
from polyfuse.cli._terminal import console
from polyfuse.spec import EXTRAS, OPS, BackendError, Unsupported, how_to_install

if TYPE_CHECKING:
    from rich.console import Console

    from polyfuse.dispatch import Backend

TRIED = "silu_mul_block_quant"  # every built-in backend has it


@click.command()
def command() -> None:
    """Explain this machine: devices, versions, which backend runs where, and what to install.

    \b
    Example:
      polyfuse doctor
    """
    from polyfuse.conformance import versions
    from polyfuse.dispatch import registry

    out, device = console(), default_device()
    _section(out, "Packages", [f"{name} {version}" for name, version in versions().items()])
    missing = dict.fromkeys(how_to_install(module) for module in EXTRAS if find_spec(module) is None)
    _section(out, "To install", [*missing] or ["nothing: every extra is there"])
    _section(out, "Devices", _devices(device))
    lines = [f"{backend.name}: {_standing(backend, device)}" for backend in registry().usable()]
    lines += [f"{name}: cannot be used: {text.strip().splitlines()[-1]}" for name, text in registry().problems]
    _section(out, "Backends", lines)
    _section(out, "Settings", _settings())


def _section(out: "Console", title: str, lines: list[str]) -> None:
    out.print(f"[bold]{title}[/]")
    for line in lines:
        out.print(f"  {escape(line)}", soft_wrap=True)


def _devices(device: str) -> list[str]:
    """What torch and JAX see, and what that means for the ops."""
    found = []
    if find_spec("torch") is not None:
        import torch

        name = f": {torch.cuda.get_device_name()}" if device == "cuda" else ""
        found.append(f"torch: {device}{name}" if device != "cpu" else "torch: cpu, no accelerator")
    if find_spec("jax") is not None:
        import jax

        try:
            found.append(f"jax: {', '.join(dict.fromkeys(d.platform for d in jax.devices()))}")
        except RuntimeError as error:  # a platform that was asked for and is not there
            found.append(f"jax: {str(error).splitlines()[0]}")
    if not found:
        found.append("cpu, for NumPy arrays alone: neither torch nor JAX is installed")
    elif device == "cpu":
        found.append("Kernels are interpreted on a CPU: that shows that they are right, and nothing of their speed.")
        if find_spec("torch") is not None and not any(map(which, (os.environ.get("CXX", "g++"), "g++"))):
            found.append("torch.compile finds no C++ compiler, which it needs on a CPU: install one, such as g++.")
    return found


def _standing(backend: "Backend", device: str) -> str:
    """How many ops a backend has here, and whether a small call does run."""
    found = verdicts(backend, "cpu" if backend.family == "numpy" else device)
    reasons = dict.fromkeys(v.reason for v in found.values() if v.status in ("not_installed", "broken", "spec_version"))
    if reasons:
        return "; ".join(reason.strip().splitlines()[-1] for reason in reasons)
    can = [v for v in found.values() if v.status != "not_implemented"]
    how = ", interpreted" if any(v.status == "interpreted" for v in can) else ""
    tried = f"; {_try(backend, device)}" if found[TRIED].status != "not_implemented" else ""
    return f"{len(can)} of {len(OPS)} ops for {backend.family} arrays{how}{tried}"


def _try(backend: "Backend", device: str) -> str:
    """Call one op on its first conformance case."""
    import polyfuse
    from polyfuse.conformance import cases, make_inputs, place

    values = make_inputs(OPS[TRIED], cases(TRIED)[0])
    try:
        where = "cpu" if backend.family == "numpy" else device
        getattr(polyfuse, TRIED)(**place(values, backend.family, where), backend=backend.name)
    except (Unsupported, BackendError, RuntimeError) as error:
        return f"a call of {TRIED} failed: {str(error).strip().splitlines()[0]}"
    return f"a call of {TRIED} ran"


def _settings() -> list[str]:
    """What the user has set, from the environment and the config file."""
    found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("POLYFUSE_")]
    path = Path(os.environ.get("POLYFUSE_CONFIG", "polyfuse.yaml"))
    found += [f"{path}: {'is read' if path.is_file() else 'does not exist'}"] if path.is_file() or len(found) else []
    return found or ["none: the platform's defaults hold"]
