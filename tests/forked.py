"""Code in a process of its own that sees packages in a folder.

The processes are forks of one that imports the frameworks once, which takes seconds, and nothing of Polyfuse.
"""

import os
import sys
from multiprocessing import get_context
from pathlib import Path

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "jax", "triton", "pydantic"])


def run(code: str, folder: Path) -> str:
    """What the code prints. Raises `AssertionError` with what it wrote to stderr if it fails."""
    process = _CONTEXT.Process(target=_execute, args=(code, folder))
    process.start()
    process.join()
    if process.exitcode:
        raise AssertionError((folder / "stderr").read_text())
    return (folder / "stdout").read_text()


def _execute(code: str, folder: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    sys.path.insert(0, str(folder))
    exec(code, {"__name__": "__main__"})
