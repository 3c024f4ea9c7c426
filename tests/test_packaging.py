"""What is declared and what is built contain all of the tree, and nothing beside `polyfuse`."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import polyfuse

ROOT = Path(__file__).parents[1]
LAYERS = ("configs", "conformance", "reference", "spec", "torch_impl", "triton_impl")
LINKED = (*LAYERS, "templates")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_files() -> set[str]:
    """Every file of the package, as its path in a wheel."""
    folders = {"polyfuse": ROOT / "src/polyfuse"} | {f"polyfuse/{linked}": ROOT / linked for linked in LINKED}
    links = tuple(f"polyfuse/{linked}/" for linked in LINKED)
    found = {
        prefix: {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*") if path.is_file()}
        for prefix, folder in folders.items()
    }
    # Whether rglob enters a link depends on the version of Python.
    found["polyfuse"] = {name for name in found["polyfuse"] if not name.startswith(links)}
    return {name for names in found.values() for name in names if not name.endswith(".pyc")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree, so that no build folder is left behind or picked up."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    for name in (*LINKED, "src"):
        copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    run = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    warned = [line for line in (run.stdout + run.stderr).splitlines() if "warning" in line.lower()]
    assert [line for line in warned if "byte-compiling is disabled" not in line] == []
    (path,) = (tree / "dist").glob("*.whl")
    return path


def test_declared_packages_are_those_of_the_tree() -> None:
    tree = {
        file.removesuffix("/__init__.py").replace("/", ".") for file in package_files() if file.endswith("/__init__.py")
    }
    declared = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(tree) == declared


def test_wheel_contains_every_file_and_polyfuse_only(wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    info = f"polyfuse-{polyfuse.__version__}.dist-info"
    metadata = {name for name in files if name.startswith(f"{info}/")}
    assert f"{info}/licenses/LICENSE" in metadata
    assert {"polyfuse/py.typed", "polyfuse/spec/__init__.py", "polyfuse/reference/jax/__init__.py"} <= files
    assert "polyfuse/templates/backend/.github/workflows/ci.yml.j2" in files
    assert files - metadata == package_files()


def test_wheel_declares_the_command_and_the_pytest_plugin(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        entry_points = next(name for name in files if name.endswith("entry_points.txt"))
        declared = archive.read(entry_points).decode()
    assert "[console_scripts]\npolyfuse = polyfuse.cli:main\n" in declared
    assert "[pytest11]\npolyfuse = polyfuse.pytest_plugin\n" in declared
    assert {"polyfuse/cli.py", "polyfuse/cli/__init__.py"} & set(files)


def test_wheel_imports_without_the_tree(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import polyfuse.spec as s, polyfuse.configs as c; print(s.__file__, c.__file__, *s.OPS)"
    output = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True).split()
    assert output[:2] == [str(tmp_path / f"polyfuse/{name}/__init__.py") for name in ("spec", "configs")]
    assert len(output) > 2
