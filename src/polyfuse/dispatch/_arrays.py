"""What the dispatcher needs to know of an array, for each framework, without importing one itself.

A framework is looked up in `sys.modules`: an array of it cannot exist unless it was imported.
"""

import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from polyfuse.spec import SpecError, dtype_name, how_to_install, not_installed
from polyfuse.spec._validate import one_line, shown

FAMILIES = ("torch", "jax", "numpy")


@dataclass(frozen=True)
class Device:
    """Where a call runs: the kind that platform files and capabilities speak of, and its architecture."""

    kind: str
    arch: tuple[int, int] | None = None


def family_of(value: Any) -> str | None:
    """`"torch"`, `"jax"` or `"numpy"`, or None for what is not an array."""
    if isinstance(value, np.ndarray):
        return "numpy"
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and isinstance(value, torch.Tensor):
        return "torch"
    if jax is not None and isinstance(value, jax.Array):
        return "jax"
    return None


def is_traced(value: Any) -> bool:
    """True for a JAX tracer: it has a shape and a dtype, but no values."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.core.Tracer)


def is_recorded(torch: Any) -> bool:
    """Whether `make_fx` records a call made now, without gradients: as one node, like a compiled graph."""
    if not torch._C._len_torch_dispatch_stack() or torch.is_grad_enabled():  # most calls end here
        return False
    tracing = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return tracing is not None and tracing.get_proxy_mode() is not None


def is_captured(device: Device) -> bool:
    """Whether calls on a device are recorded into a CUDA graph now, by PyTorch and on the current stream."""
    torch = sys.modules.get("torch")
    return device.kind in ("cuda", "rocm") and torch is not None and torch.cuda.is_current_stream_capturing()


def device_of(value: Any, family: str) -> Device:
    """The device of an array; for a tracer, JAX's default backend."""
    if family == "torch":
        return torch_device(value.device)
    if family == "jax":
        import jax

        if is_traced(value):
            return _jax_device(jax.devices()[0])
        return _jax_device(next(iter(value.devices())))
    return Device("cpu")


@lru_cache(maxsize=64)
def torch_device(device: Any) -> Device:
    import torch

    if device.type != "cuda":
        return Device(device.type)
    return Device("rocm" if torch.version.hip else "cuda", torch.cuda.get_device_capability(device))


@lru_cache(maxsize=64)
def _jax_device(device: Any) -> Device:
    if device.platform != "gpu":
        return Device(device.platform)
    if "rocm" in device.client.platform_version.lower():
        return Device("rocm")
    major, _, minor = str(device.compute_capability).partition(".")
    return Device("cuda", (int(major), int(minor or 0)))


def to_numpy(value: Any) -> np.ndarray[Any, Any]:
    """A NumPy copy of any array, low-precision dtypes included."""
    if family_of(value) != "torch":
        return np.asarray(value)
    host = value.detach().cpu()
    name = dtype_name(host.dtype)
    if name == "bfloat16" or name.startswith("float8"):
        import ml_dtypes
        import torch

        bits = torch.uint8 if host.element_size() == 1 else torch.uint16
        return host.view(bits).numpy().view(getattr(ml_dtypes, name))
    return host.numpy()


def from_numpy(value: np.ndarray[Any, Any], family: str, device: str = "cpu") -> Any:
    """A NumPy array as an array of `family` on `device` (torch's or JAX's name of it), strides kept for torch."""
    if family == "numpy":
        return value
    if missing := not_installed(f"{family} arrays", family):
        raise missing
    if family == "jax":
        import jax

        return jax.device_put(value, jax.devices(device.replace("rocm", "gpu"))[0])
    import torch

    name = dtype_name(value.dtype)
    if name == "bfloat16" or name.startswith("float8"):
        bits = value.view(np.uint8 if value.dtype.itemsize == 1 else np.uint16)
        tensor = torch.from_numpy(bits).view(getattr(torch, name))
    else:
        tensor = torch.from_numpy(value)
    # empty_strided: `.to(device)` alone drops the gaps of a strided layout.
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return moved.copy_(tensor)


def check_device(argument: str, device: str, families: Iterable[str]) -> None:
    """Raise `SpecError` for a device on which no array of these families can be made here.

    NumPy's arrays are on the CPU whatever the device is: where there are no others, it is torch's or JAX's device.
    """
    if device == "cpu":
        return
    frameworks = [family for family in ("torch", "jax") if family in families] or ["torch", "jax"]
    reasons = []
    for family in filter(importlib.util.find_spec, frameworks):
        try:
            to_numpy(from_numpy(np.zeros(1, np.float32), family, device))
            return
        except (RuntimeError, AssertionError, ImportError) as error:  # unknown, not compiled in, no driver, none there
            reasons.append(f"{family}: {str(error).strip().splitlines()[0]}")
    why = "; ".join(reasons) or " or ".join(map(how_to_install, frameworks))
    raise SpecError(f"{argument}: expected a device of this machine, such as {_accelerator()}, got {device!r} ({why})")


def _accelerator() -> str:
    torch = sys.modules.get("torch")
    found = torch is not None and torch.accelerator.is_available()
    return str(torch.accelerator.current_accelerator()) if torch and found else "cpu"


def convert(value: Any, family: str) -> Any:
    """An array as one of another framework on the same device, sharing memory through DLPack where it can."""
    source = family_of(value)
    if source is None or source == family:
        return value
    if is_traced(value):
        raise SpecError(f"backend: a traced JAX array cannot become a {family} array; try the call outside jit")
    try:
        if "numpy" in (source, family):
            return from_numpy(to_numpy(value), family)
        if family == "jax":
            import jax

            return jax.dlpack.from_dlpack(value.detach().contiguous())
        import torch

        return torch.from_dlpack(value)
    # An array without data, or on a device or of a kind that the other framework has not.
    except (TypeError, ValueError, RuntimeError, NotImplementedError, BufferError) as error:
        raise SpecError(f"backend: {shown(value)} cannot become a {family} array: {one_line(error)}") from error
