"""The device that a command runs on."""

import importlib
import importlib.util
from collections.abc import Sequence


def default_device() -> str:
    """`cuda`, or what torch calls this machine's accelerator, else `cpu`."""
    if importlib.util.find_spec("torch") is None:
        return "cpu"
    import torch

    if importlib.util.find_spec("triton"):
        importlib.import_module("polyfuse.triton_impl")  # chooses the interpreter before anything imports triton

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"


def chosen_device(given: str | None, families: Sequence[str] = ()) -> str:
    """The device that `--device` gives, or the default one.

    Raises `SpecError` for a device on which this machine can make no arrays of `families`.
    """
    from polyfuse.dispatch import check_device

    device = given or default_device()
    check_device("--device", device, families)
    return device
