"""The ranks of a torch.distributed group, forked from one process: what they import is imported once."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_ranks(module: str, directory: Path, *, options: Sequence[str] = (), timeout_s: float, **env: str) -> None:
    """Run a module of the tests as a program that calls `fork_ranks`, and wait for it.

    Raises `AssertionError` with what it wrote to stderr if a rank fails, and `subprocess.TimeoutExpired`.
    """
    command = [sys.executable, *options, "-m", module, str(directory)]
    # One thread each, because threads that were started before do not survive a fork.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as program:
        try:
            _, errors = program.communicate(timeout=timeout_s)
        except BaseException:
            os.killpg(program.pid, 9)
            raise
    if program.returncode:
        raise AssertionError(f"{module}: a rank failed:\n{errors}")


def fork_ranks(process: Callable[[int, Path], None], ranks: int) -> None:
    """Call `process(rank, directory)` in a fork for every rank, and exit with 1 if any of them fails."""
    directory = Path(sys.argv[1])
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            process(rank, directory)
            os._exit(0)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(any(statuses))
