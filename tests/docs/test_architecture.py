"""docs/architecture.md names every folder, and its picture of imports is the contract that is enforced."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def test_the_picture_is_the_contract() -> None:
    picture = PAGE.split("## Who may import whom")[1].split("```text\n")[1].split("```")[0]
    (layers,) = [contract["layers"] for contract in CONTRACTS if contract["type"] == "layers"]
    assert picture.splitlines() == layers


def test_the_other_contracts_are_listed() -> None:
    listed = re.findall(r"^- (.+)$", PAGE.split("The other contracts:")[1], flags=re.MULTILINE)
    assert listed == [contract["name"] for contract in CONTRACTS if contract["type"] != "layers"]


def test_every_folder_is_named() -> None:
    table = PAGE.split("## Where a change goes")[1].split("## Who")[0]
    named = set(re.findall(r"`([\w/]+)/`", "\n".join(re.findall(r"^\| (.+?) \|", table, flags=re.MULTILINE))))
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    folders |= {"benchmarks", "docs", "examples", "scripts", "src/polyfuse", "templates", "tests"}
    packages = [path.parent for path in (ROOT / "src/polyfuse").glob("*/__init__.py")]
    folders |= {f"src/polyfuse/{package.name}" for package in packages if not package.is_symlink()}
    assert named == folders
