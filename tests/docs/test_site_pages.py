"""The pages as scripts/site.py lays them out for MkDocs: no link leads nowhere, and every example is a page."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages."""
    spec = importlib.util.spec_from_file_location("polyfuse_site", ROOT / "scripts/site.py")
    assert spec is not None
    assert spec.loader is not None
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    site.PAGES = tmp_path_factory.mktemp("site") / "pages"
    site.lay_out()
    return Path(site.PAGES)


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page lead to in the site, without anchors."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    paths = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    return [path for path in paths if path and not path.startswith("http")]


def test_every_link_leads_to_a_file_of_the_site(laid_out: Path) -> None:
    pages = list(laid_out.rglob("*.md"))
    broken = [(page.name, path) for page in pages for path in links(page) if not (page.parent / path).is_file()]
    assert not broken
    assert len(pages) > 40


def test_files_that_pages_name_can_be_read(laid_out: Path) -> None:
    for name in ("benchmarks/results/host_x86_64.json", "configs/tuning/nvidia_h200.yaml", "constraints.txt"):
        assert (laid_out / name).read_bytes() == (ROOT / name).read_bytes()


def test_a_link_to_a_folder_is_its_text(laid_out: Path) -> None:
    assert "[configs/platforms](../configs/platforms)" in (ROOT / "docs/selection.md").read_text(encoding="utf-8")
    assert "| configs/platforms, by the kind" in (laid_out / "docs/selection.md").read_text(encoding="utf-8")


def test_every_example_is_a_page_that_the_list_of_examples_links_to(laid_out: Path) -> None:
    listed = links(laid_out / "examples/README.md")
    scripts = list((ROOT / "examples").glob("*.py"))
    assert scripts
    for script in scripts:
        page, code = script.with_suffix(".md").name, script.read_text(encoding="utf-8")
        assert page in listed
        assert f"```python\n{code}```" in (laid_out / "examples" / page).read_text(encoding="utf-8")
    for folder in (ROOT / "examples").glob("*/README.md"):
        assert f"{folder.parent.name}/README.md" in listed
    assert "quickstart.ipynb" in listed


def test_the_server_can_be_found_where_its_states_are_explained(laid_out: Path) -> None:
    assert "../examples/serve_gdn_layer.md" in links(laid_out / "docs/decode.md")
