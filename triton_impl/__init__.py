"""Triton kernels: native on a GPU, interpreted on the CPU of a machine without one."""

if __name__ != "polyfuse.triton_impl":
    raise ImportError(f"import polyfuse.triton_impl, not {__name__}: a second identity compiles every kernel twice")

import os
import sys
from functools import lru_cache
from importlib.util import find_spec

from polyfuse.spec import how_to_install


def _gpu_usable() -> bool:
    import torch

    return torch.cuda.is_available() or torch.xpu.is_available()


if "triton" not in sys.modules and find_spec("torch") is not None and not _gpu_usable():
    # Triton reads this when it is imported: later is too late for its own library functions.
    os.environ["TRITON_INTERPRET"] = "1"


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why no kernel of this backend can run on this machine, or None if they can."""
    for package in ("torch", "triton"):
        if find_spec(package) is None:
            return how_to_install(package)
    if _gpu_usable():
        return None
    if "triton" in sys.modules:
        from triton.language import cdiv
        from triton.runtime.jit import JITFunction

        if isinstance(cdiv, JITFunction):
            return "no GPU, and triton was imported without TRITON_INTERPRET=1; import polyfuse.triton_impl before it"
    return None
