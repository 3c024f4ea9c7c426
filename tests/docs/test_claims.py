"""What the pages say of the code in words and numbers, held to the code."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import polyfuse
from polyfuse.conformance import shadow
from polyfuse.conformance.golden import export
from polyfuse.conformance.workers import default_count
from polyfuse.dispatch import registry
from polyfuse.spec import OPS
from polyfuse.spec.gdn_decode import MAX_TOKENS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILT_IN = {"triton": "torch", "torch": "torch", "pallas": "jax", "jax": "jax", "numpy": "numpy"}


def page(name: str) -> str:
    """A page in one line, so that a sentence is found wherever it is broken."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


@pytest.mark.parametrize("op", OPS)
def test_an_op_runs_on_arrays_of_every_framework_and_has_several_backends(op: str) -> None:
    """README: one function for each op, on PyTorch, JAX and NumPy arrays; one oracle and several backends."""
    found = [name for name in BUILT_IN if op in registry().get(name).implements]
    assert {BUILT_IN[name] for name in found} == {"torch", "jax", "numpy"}
    assert len(found) > 2
    assert page("README.md").count(f"](docs/ops/{op}.md)") == 1


def test_the_changelog_names_every_op_and_every_backend() -> None:
    listed = page("CHANGELOG.md").split("- Ops, ")[1].split(" - ")[0]
    assert re.findall(r"`(\w+)`", listed) == list(dict.fromkeys(re.findall(r"`(\w+)`", listed)))
    assert set(re.findall(r"`(\w+)`", listed)) == set(OPS)
    backends = page("CHANGELOG.md").split("- Backends: ")[1].split(";")[0]
    assert re.findall(r"`(\w+)`", backends) == list(BUILT_IN)
    assert {name: registry().get(name).family for name in BUILT_IN} == BUILT_IN


def test_the_table_of_extras_is_the_project_s() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", (ROOT / "docs/install.md").read_text(), flags=re.MULTILINE)
    table = dict(rows)
    extras = PROJECT["optional-dependencies"]
    for name in table.keys() - {"all"}:
        assert table[name].split(", ") == [
            {"scikit-image": "scikit-image"}.get(p, p) for p in map(package, extras[name])
        ]
    assert extras["all"] == [f"polyfuse[{','.join(name for name in table if name != 'all')}]"]
    assert f"dist/polyfuse-{polyfuse.__version__}-py3-none-any.whl" in page("docs/install.md")


def package(requirement: str) -> str:
    match = re.match(r"[\w-]+", requirement)
    assert match is not None
    return match[0]


def test_the_versions_of_transformers_that_pages_name_are_those_that_are_tested() -> None:
    (bounds,) = [text for text in PROJECT["optional-dependencies"]["transformers"] if text.startswith("transformers")]
    oldest, newest = re.findall(r"[>=<]([\d.]+)", bounds)
    tested = re.findall(r"make test-transformers VERSION=([\d.]+)", (ROOT / ".ci/run").read_text())
    named = {oldest, *(version.removesuffix(".0") for version in tested)}
    assert [int(version.split(".")[1]) + 1 for version in tested] == [int(newest.split(".")[1])], "the newest allowed"
    for name in ("docs/accelerate.md", "docs/gated_delta_net.md", "CONTRIBUTING.md"):
        said = set(re.findall(r"(?:Transformers|tested|pinned|VERSION)[ =(]*(5\.\d+)(?:\.0)?", page(name)))
        said |= set(re.findall(r"5\.\d+ and (5\.\d+)", page(name)))
        assert said == named, name


def test_numbers_are_those_of_the_code() -> None:
    assert f"At most {shadow.WAITING} samples" in page("docs/shadow.md")
    assert f"more than {shadow.LARGEST:,} elements" in page("docs/shadow.md")
    assert f"verifies up to {MAX_TOKENS} tokens" in page("docs/decode.md")
    assert "as many as there are cores but no more than 4" in page("docs/conformance.md")
    assert default_count("cpu") <= 4


def test_the_core_cases_are_about_as_large_as_said(tmp_path: Path) -> None:
    export(tmp_path)
    megabytes = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) / 1e6
    (said,) = re.findall(r"about (\d+) MB", page("docs/golden.md"))
    assert float(said) == pytest.approx(megabytes, rel=0.25)


def test_the_pytest_options_are_the_plugin_s() -> None:
    told = re.findall(r"^\| `(--polyfuse-\w+)", (ROOT / "docs/conformance.md").read_text(), flags=re.MULTILINE)
    declared = re.findall(r'"(--polyfuse-\w+)"', (ROOT / "src/polyfuse/pytest_plugin.py").read_text())
    assert set(declared) - {"--polyfuse-profile"} == set(told), "the former name of --polyfuse-level is not shown"


def test_no_page_says_that_a_run_proves_a_backend() -> None:
    """A run compares cases; a level says in a sentence what that shows."""
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("src/polyfuse/cli/**/*.py"),
    ]
    wrong = [
        path.name for path in pages if re.search(r"(?i)\bproves? (every|all|each|the|a )?\s*backend", path.read_text())
    ]
    assert not wrong


def test_the_site_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"(?:: |- )((?:docs|examples)/[\w/.-]+\.(?:md|ipynb)|[A-Z]+\.md)$", text, flags=re.MULTILINE)
    patterns = ("docs/*.md", "examples/README.md", "examples/*/README.md", "examples/*.ipynb")
    written = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    assert set(listed) == written | {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/api.md"}
    assert len(listed) == len(set(listed))
    assert yaml.safe_load(text)["site_name"] == "Polyfuse"
