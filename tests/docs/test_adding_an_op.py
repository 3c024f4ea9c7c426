"""`docs/adding_an_op.md` works: its files, added to a copy of the repository, make an op that conforms."""

import os
import re
import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from polyfuse.spec import OPS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/adding_an_op.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w/]+\.py)`\n\n```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))

pytestmark = pytest.mark.skipif("rms_norm" in OPS, reason="the example has been added to this tree already")

IGNORED = ignore_patterns("__pycache__", ".*cache", ".git", ".venv", "*.egg-info", "build", "dist", "results")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the page's files, the line in the table, and what is generated."""
    tree = tmp_path_factory.mktemp("copy") / "polyfuse"
    copytree(ROOT, tree, symlinks=True, ignore=IGNORED)
    for name, text in FILES.items():
        assert not (tree / name).exists()
        (tree / name).write_text(text, encoding="utf-8")
    table = tree / "spec/__init__.py"
    text = table.read_text(encoding="utf-8")
    table.write_text(re.sub(r"(_NAMES = \([^)]*)\)", r'\1    "rms_norm",\n)', text), encoding="utf-8")
    run(tree, "scripts/generate.py")
    return tree


def run(tree: Path, *arguments: str, status: int = 0) -> str:
    """What Python prints, run in the copy with its own sources."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "COLUMNS": "200", "PYTEST_ADDOPTS": ""}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_at_most_five_files_are_written_by_hand() -> None:
    assert len(FILES) <= 5
    assert {"spec/rms_norm.py", "reference/rms_norm.py", "torch_impl/rms_norm.py"} <= set(FILES)


def test_the_files_pass_the_linter(tree: Path) -> None:
    run(tree, "-m", "ruff", "check", *FILES)
    run(tree, "-m", "ruff", "format", "--check", *FILES)


def test_the_op_conforms_and_other_backends_say_that_they_lack_it(tree: Path) -> None:
    out = run(tree, "-m", "polyfuse", "conformance", "--op", "rms_norm", "--device", "cpu")
    for backend in ("numpy", "torch"):
        assert f"{backend}: 1 of 1 ops conformant" in out
    for backend in ("jax", "pallas", "triton"):
        assert len(re.findall(f"skipped {backend}: .*does not implement rms_norm", out)) == 1
    assert "0 failed" in out


def test_the_public_function_is_there_with_its_types(tree: Path) -> None:
    code = "import torch, polyfuse; print(polyfuse.rms_norm(torch.ones(2, 8), torch.full((8,), 3.0))[0, 0].item())"
    assert float(run(tree, "-c", code)) == pytest.approx(3, abs=1e-5)
    assert "def rms_norm(\n" in (tree / "src/polyfuse/_ops.py").read_text()
    assert "rms_norm as rms_norm" in (tree / "src/polyfuse/__init__.pyi").read_text()
    assert (tree / "docs/ops/rms_norm.md").is_file()


@pytest.mark.slow
def test_the_repositorys_own_tests_pass_with_it(tree: Path) -> None:
    tests = ["tests/reference/test_rms_norm.py", "tests/test_layout.py", "tests/test_generated.py"]
    tests += ["tests/conformance/test_mutants.py", "tests/spec", "tests/dispatch/test_torch_library.py"]
    out = run(tree, "-m", "pytest", "-p", "no:cacheprovider", *tests, "-k", "rms_norm or signature or file")
    assert "failed" not in out
    assert int(re.findall(r"(\d+) passed", out)[0]) > 20
