"""Golden vectors in a folder of a test, outputs for them, and the verdicts of Python and of C."""

import json
import subprocess
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from shutil import which
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest

from polyfuse.conformance import Case, all_cases, cases, make_inputs
from polyfuse.conformance.golden import verify
from polyfuse.conformance.golden._files import write
from polyfuse.spec import OPS

SOURCE = Path(__file__).parents[2] / "conformance/golden/golden_verify.c"
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1", "-g")


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def case_named(op: str, name: str) -> Case:
    """The op's case of that name, looked for among its own first: the others take long to plan."""
    return next(case for found in (cases, all_cases) for case in found(op) if case.name == name)


def results(entry: Mapping[str, Any], function: Callable[..., Any], seed: int = 0) -> dict[str, Any]:
    """The results of a function with an op's parameters on the inputs of a manifest's case, by name."""
    given = make_inputs(OPS[entry["op"]], case_named(entry["op"], entry["case"]), seed)
    got = function(**given)
    got = got if isinstance(got, tuple) else (got,)
    return dict(zip((result["name"] for result in entry["results"]), got, strict=True))


def write_outputs(outputs: Path, entry: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    for result in entry["results"]:
        write(outputs / result["file"], arrays[result["name"]])


@cache
def program(*options: str) -> Path:
    """The C program, compiled; the test is skipped where there is no compiler."""
    if which("cc") is None:
        pytest.skip("there is no C compiler cc")
    built = Path(mkdtemp()) / "golden_verify"
    subprocess.run(["cc", *STRICT, *options, "-o", built, SOURCE], check=True)
    return built


def sanitized() -> Path:
    """The C program that stops where it reads or writes past an array, if this compiler can do that."""
    try:
        return program("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    except subprocess.CalledProcessError:
        return program()


def of_c(folder: Path, outputs: Path) -> tuple[int, list[str], str]:
    """The C program's exit status, lines and errors."""
    done = subprocess.run([sanitized(), folder, outputs], capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines(), done.stderr


def of_python(folder: Path, outputs: Path) -> dict[str, tuple[str, ...]]:
    return {verdict.case: verdict.problems for verdict in verify(folder, outputs)}


def wrong_results(lines: Iterable[str]) -> set[tuple[str, str]]:
    """(case, array) of each line that C prints of something wrong."""
    found = set()
    for line in lines:
        if line.startswith("WRONG  "):
            case, array, _ = line.removeprefix("WRONG  ").split(": ", 2)
            found.add((case, array))
    return found


def bits(array: Any) -> bytes:
    return np.ascontiguousarray(array).tobytes()
