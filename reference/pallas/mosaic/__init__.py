"""Ops of the Pallas layer as Mosaic GPU kernels, for NVIDIA GPUs of compute capability 9.0 and later.

They stand beside the kernels that Pallas lowers through Triton, a backend that JAX deprecates, and take the calls that
`kernel_of` in each op's module states; every other call, device and platform keeps the other kernel. This module alone
decides whether they are asked, and imports no Mosaic GPU before that: with JAX 0.10 its import needs absl-py, which JAX
does not require.
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import jax

PREFERRED = True  # False leaves the calls to the kernels that go through Triton

LEAST_COMPUTE_CAPABILITY = (9, 0)


def preferred(op: str) -> ModuleType | None:
    """Return the module of an op's Mosaic GPU kernel if it is to be preferred on the GPUs of this process."""
    return import_module(f"{__name__}.{op}") if PREFERRED and usable() else None


@cache
def usable() -> bool:
    """Return whether Mosaic GPU can be imported, and every GPU of this process runs it.

    A process without a GPU can lower these kernels, but cannot know for which GPU.
    """
    try:
        devices = jax.local_devices(backend="cuda")
        import_module("jax.experimental.pallas.mosaic_gpu")
    except (ImportError, RuntimeError):
        return False
    return all(_compute_capability(device) >= LEAST_COMPUTE_CAPABILITY for device in devices)


def _compute_capability(device: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in str(device.compute_capability).split("."))
