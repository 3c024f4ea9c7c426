"""What all commands share: the terminal they print to, and the device they run on by default."""

import importlib
import importlib.util
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def console() -> Console:
    """Stdout; wide enough for tables when it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def progress(out: Console) -> Progress:
    """A bar with a count and the time, which disappears at the end."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=out, transient=True)


def default_device() -> str:
    """`cuda`, or what torch calls this machine's accelerator, else `cpu`."""
    if importlib.util.find_spec("torch") is None:
        return "cpu"
    import torch

    if importlib.util.find_spec("triton"):
        importlib.import_module("polyfuse.triton_impl")  # chooses the interpreter before anything imports triton

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"
