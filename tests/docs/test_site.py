"""The site of the documentation in a real browser: its links, its search, its pictures, on a phone and on a desktop."""

import html
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from polyfuse.spec import OPS

ROOT = Path(__file__).parents[2]
NEEDED = ("mkdocs", "mkdocs_jupyter", "mkdocstrings", "playwright")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed; try: make docs-browser"),
]


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "scripts/site.py", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no browser; try: make docs-browser ({str(error).splitlines()[0]})")
        yield found
        found.close()


def pages(site: Path) -> list[str]:
    return sorted(p.parent.relative_to(site).as_posix() for p in site.rglob("index.html"))


@pytest.mark.parametrize("width", [390, 1280])
def test_every_page_fits_and_loads_its_pictures(site: Path, address: str, browser: Any, width: int) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900})
    wrong = []
    shown: dict[str, set[str]] = {}
    for page in pages(site):
        tab.goto(f"{address}{page}/".replace("/./", "/"))
        tab.wait_for_load_state("load")
        over = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        broken = tab.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)")
        shown[page] = set(tab.evaluate("[...document.images].map(i => i.src.split('/').pop())"))
        if over > 0 or broken:
            wrong.append((page, over, broken))
    assert not wrong
    assert all(f"{op}.svg" in shown[f"docs/ops/{op}"] for op in OPS)
    assert shown["docs/benchmarks"] >= {path.name for path in ROOT.glob("benchmarks/plots/*.svg")}
    assert "conformance_report.png" in shown["docs/porting"]
    assert len(pages(site)) > len(OPS) + 10


def test_code_stands_on_the_site_as_it_is_written(site: Path) -> None:
    changed = []
    for page in ROOT.glob("docs/**/*.md"):
        built = site / page.relative_to(ROOT).with_suffix("") / "index.html"
        shown = html.unescape(re.sub(r"<[^>]+>", "", built.read_text(encoding="utf-8")))
        fences = re.findall(r"^```\w+\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        changed += [(page.stem, block) for block in fences if block.strip() not in shown]
    assert not changed, "such as linears[name](x), which is no link"


def test_no_link_is_broken(site: Path, address: str, browser: Any) -> None:
    tab = browser.new_page()
    anchors: dict[str, set[str]] = {}
    links: list[tuple[str, str]] = []
    for page in pages(site):
        tab.goto(f"{address}{page}/".replace("/./", "/"))
        here = tab.url
        anchors[here] = set(tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
        links += [(here, link) for link in tab.evaluate("[...document.links].map(a => a.href)")]
    inside = [(here, *link.partition("#")[::2]) for here, link in links if link.startswith(address)]
    broken = {
        (here, target, anchor)
        for here, target, anchor in inside
        if not (site / target.removeprefix(address)).is_file()  # a picture
        and (target not in anchors or (anchor and unquote(anchor) not in anchors[target]))
    }
    assert not broken
    assert len(inside) > 500


@pytest.mark.parametrize("op", ["gdn_decode", "segment_attention"])
def test_the_search_finds_an_op(address: str, browser: Any, op: str) -> None:
    with browser.new_page(viewport={"width": 1280, "height": 900}) as tab:
        tab.goto(address)
        tab.locator(".md-search__input").press_sequentially(op)  # it looks at keys, not at what is filled in
        tab.locator(f".md-search-result__link[href*='ops/{op}']").first.wait_for(state="attached", timeout=60_000)
