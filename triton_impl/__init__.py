"""Triton kernels: native on a GPU, interpreted on the CPU of a machine without one."""

if __name__ != "polyfuse.triton_impl":
    raise ImportError(f"import polyfuse.triton_impl, not {__name__}: a second identity compiles every kernel twice")

import os
import sys
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from polyfuse.spec import how_to_install


def _gpu_usable() -> bool:
    import torch

    return torch.cuda.is_available() or torch.xpu.is_available()


def _interpret_library() -> None:
    """Make a triton that was imported to compile interpret its own library functions, such as `tl.sum`.

    They became one or the other when triton was imported; Transformers imports it before polyfuse can say which.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    interpreted: dict[int, Any] = {}
    modules = [module for name, module in sys.modules.items() if name.startswith("triton.language")]
    for place in (*modules, tl.tensor):
        for name, function in list(vars(place).items()):
            if isinstance(function, JITFunction):
                made = interpreted.setdefault(id(function), InterpretedFunction(function.fn))
                setattr(place, name, made)


# Without a GPU kernels are interpreted, unless TRITON_INTERPRET=0 asks for compilation alone.
_COMPILES_ALONE = os.environ.get("TRITON_INTERPRET") == "0" and find_spec("torch") is not None and not _gpu_usable()
if find_spec("torch") is not None and find_spec("triton") is not None and not (_COMPILES_ALONE or _gpu_usable()):
    os.environ["TRITON_INTERPRET"] = "1"  # is read when triton.jit decorates a kernel
    if "triton" in sys.modules:
        _interpret_library()


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why no kernel of this backend can run on this machine, or None if they can."""
    for package in ("torch", "triton"):
        if find_spec(package) is None:
            return how_to_install(package)
    return "no GPU, and TRITON_INTERPRET=0 forbids to interpret its kernels" if _COMPILES_ALONE else None
