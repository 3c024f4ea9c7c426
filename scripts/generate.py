"""Write what the repository holds of generated text: the public functions, and the ops' pages and pictures in docs."""

import subprocess
import sys
from pathlib import Path

from polyfuse.spec import FORMER_NAMES, OPS, op_page, op_picture, package_stub, public_module

ROOT = Path(__file__).parents[1]


def generated() -> dict[Path, str]:
    """Every generated file, by its path in the repository, with the text that it should have."""
    files = {
        Path("src/polyfuse/_ops.py"): _formatted(public_module(OPS.values())),
        Path("src/polyfuse/__init__.pyi"): package_stub(OPS.values(), FORMER_NAMES),
    }
    files |= {Path(f"docs/ops/{name}.md"): op_page(spec) for name, spec in OPS.items()}
    return files | {Path(f"docs/ops/{name}.svg"): op_picture(spec) for name, spec in OPS.items()}


def _formatted(source: str) -> str:
    """Python source as ruff formats it in this repository."""
    command = [sys.executable, "-m", "ruff", "format", "--config", str(ROOT / "pyproject.toml"), "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    for path, text in generated().items():
        target = ROOT / path
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
            print(f"written: {path}")
