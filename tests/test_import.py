"""`import polyfuse` is cheap: frameworks are loaded when an op first needs them."""

import subprocess
import sys
import tomllib
from pathlib import Path

import polyfuse

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "jax", "triton", "pydantic", "transformers", "numpy")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_loads_no_framework() -> None:
    loaded = run("import sys, polyfuse; print(*sys.modules)").split()
    assert "polyfuse" in loaded
    assert set(HEAVY).isdisjoint(loaded)


def test_import_takes_under_200_ms() -> None:
    code = "import time; t = time.perf_counter(); import polyfuse; print(time.perf_counter() - t)"
    seconds = [float(run(code)) for _ in range(5)]
    assert min(seconds) < 0.2, seconds


def test_version_is_that_of_the_project_and_the_newest_of_the_changelog() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["project"]["dynamic"] == ["version"]
    assert pyproject["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "polyfuse.__version__"}}
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert newest == f"## {polyfuse.__version__}"
