"""Compiles kernels for a Hopper GPU, without one, in a process that does not interpret kernels."""

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton  # before polyfuse, which chooses the interpreter where there is no GPU
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_for_hopper(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: list[str], warps: int
) -> tuple[str, list[str]]:
    """The PTX of a kernel, and what it spills: the non-zero sizes of its stack and local memory.

    `types` are those of the parameters that are not in `constants`; `aligned` names pointers to multiples of 16 bytes
    and integers that are multiples of 16.
    """
    position = kernel.arg_names.index
    source = ASTSource(
        kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in kernel.arg_names},
        constexprs={(position(name),): value for name, value in constants.items()},
        attrs={(position(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin], text=True)
    return made.asm["ptx"], re.findall(r"(?:STACK|LOCAL):(?!0 )", usage)
