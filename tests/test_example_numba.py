"""The example backend `examples/polyfuse-numba`, installed from its wheel beside polyfuse's own, outside the tree."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/polyfuse-numba"
IGNORED = ignore_patterns("__pycache__", "*.egg-info", "build", "dist")

pytestmark = pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")

# Decoded values may be one step of the format apart: exp() is right to 2 ulp, not to the bit.
CALL = """
import torch, polyfuse
x = torch.randn(33, 512, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
q, scale = polyfuse.silu_mul_block_quant(x, backend="numba")
want_q, want_scale = polyfuse.silu_mul_block_quant(x, backend="torch")
torch.testing.assert_close(scale, want_scale, rtol=2**-20, atol=0)
print(q.dtype, tuple(q.shape), (q.view(torch.uint8) != want_q.view(torch.uint8)).sum().item())
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with both wheels, and the running one's third-party packages."""
    folder = tmp_path_factory.mktemp("example")
    wheels = folder / "wheels"
    tree = folder / "polyfuse"
    layers = [path.name for path in (ROOT / "src/polyfuse").iterdir() if path.is_symlink()]
    for name in ("src", *layers):
        copytree(ROOT / name, tree / name, symlinks=True, ignore=IGNORED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    copytree(EXAMPLE, folder / "numba", ignore=IGNORED)
    for source in (tree, folder / "numba"):
        run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), "."], source)
    run([sys.executable, "-m", "venv", "--without-pip", "fresh"], folder)
    fresh = folder / "fresh/bin/python"
    # Before the other packages can be seen: pip would take an installed polyfuse for this one.
    pip = [sys.executable, "-m", "pip", "--python", str(fresh), "install", "-q", "--no-deps", "--no-index"]
    run([*pip, *map(str, wheels.iterdir())], folder)
    site = run([str(fresh), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    Path(site, "third_party.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return fresh


def run(command: list[str], folder: Path) -> str:
    """The output of a command, run in a folder without the settings of this tree."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_both_packages_come_from_their_wheels(python: Path, tmp_path: Path) -> None:
    code = "import polyfuse, polyfuse_numba; print(polyfuse.__file__, polyfuse_numba.__file__)"
    environment = str(python.parents[1])
    assert all(file.startswith(environment) for file in run([str(python), "-c", code], tmp_path).split())


def test_info_lists_it_as_available(python: Path, tmp_path: Path) -> None:
    data = json.loads(run([str(python), "-m", "polyfuse", "info", "--json"], tmp_path))
    (listed,) = [backend for backend in data["backends"] if backend["name"] == "numba"]
    assert [verdict["status"] for verdict in listed["ops"].values()].count("available") == 5


@pytest.mark.slow
def test_it_is_conformant(python: Path, tmp_path: Path) -> None:
    command = ["conformance", "--backend", "numba", "--level", "quick", "--device", "cpu"]
    out = run([str(python), "-m", "polyfuse", *command], tmp_path)
    assert " 0 failed" in out


def test_a_call_equals_the_torch_backend(python: Path, tmp_path: Path) -> None:
    *kind, differing = run([str(python), "-c", CALL], tmp_path).rsplit(maxsplit=1)
    assert kind == ["torch.float8_e4m3fn (33, 256)"]
    assert int(differing) < 33 * 256 // 1000
