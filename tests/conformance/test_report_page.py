"""The HTML page, looked at in a real browser: what it shows, loads and lets one do."""

import random
import re
import shutil
import time

import pytest

from polyfuse.conformance import Report, Result
from polyfuse.conformance.report import printable
from tests.conformance.reports import NASTY, made, varied

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
QUIET = ("--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium of this machine."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'polyfuse[dev]'")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=[*FLAGS, *QUIET])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The page of a report that has everything in it."""
    return varied().write_file(tmp_path_factory.mktemp("report") / "conformance.html")


@pytest.fixture
def visit(browser):
    """Open a page; at the end it must have said nothing, failed nowhere and asked for no more than itself."""
    contexts, said, asked = [], [], []

    def open_page(path, width=1200, scheme="light", **settings):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert all(re.match(r"file:.*\.html$", url) for url in asked), asked


def test_the_page_shows_the_matrix_and_what_was_proven_and_what_was_not(visit, path):
    page = visit(path)
    assert page.title() == "Polyfuse conformance: mine, other on cuda (NVIDIA H200)"
    assert page.locator(".matrix").is_visible()
    cells = [re.sub(r"\s+", " ", text) for text in page.locator(".matrix td").all_inner_texts()]
    assert cells == [
        "✕ failed 100% of cases claimed 2 passed, 2 failed, 1 waived",
        "- not run does not implement a",
        "✓ conformant 50% of cases claimed 1 passed",
        "✓ conformant 100% of cases claimed 1 passed",
    ]
    proven, not_proven = page.locator("#proven .card").all_inner_texts()
    assert "Level standard: Every dtype, pairwise." in proven
    assert "Every element lies in the oracle's interval. values, 2 cases failed it" in proven
    for gap in ("1 case not claimed", "1 case too large", "1 case left out", "1 case failed, as"):
        assert gap in not_proven
    assert "a on mine: that a call with ends does not wait for the device, or can be captured in a graph." in not_proven
    facts = page.locator("#run").inner_text()
    for fact in ("NVIDIA H200", "570.1", "12.8", "0123456789ab", "1 waiver"):
        assert fact in facts


AXIS = "texts => texts.map(text => [text.textContent, parseFloat(text.getAttribute('x'))])"


def test_the_margins_lie_on_the_axis_by_their_logarithm(visit, path):
    page = visit(path)
    dots = page.locator("[aria-label='Margins of a on mine'] circle")
    found = [(float(dot.get_attribute("cx")[:-1]), dot.get_attribute("class")) for dot in dots.all()]
    axis = dict(page.locator(".axis").first.locator("text").evaluate_all(AXIS))
    exact, quarter, beyond, infinite = found
    assert exact == (axis["exact"], None)
    assert axis["10%"] < quarter[0] < axis["bound"]
    assert axis["bound"] < beyond[0] < axis["10x"]
    assert infinite[0] == axis["10x"]
    assert [kind for _, kind in found] == [None, None, "failed", "failed"]
    page.locator("#margins summary").first.click()
    row = page.locator("#margins tbody tr", has_text="4.000")
    assert page.locator(".plot").first.inner_text().split() == ["mine", "largest:", "not", "finite"]
    assert row.inner_text().split("\t") == ["mine", "y", "4.000 of the bound", "wrong [2, 0]"]


def test_a_cell_opens_its_cases_and_a_case_shows_its_messages_and_its_command(visit, path):
    page = visit(path)
    page.locator(".matrix a").first.click()
    case = page.locator("details.case", has_text="wrong").first
    assert case.locator("pre").first.is_hidden()
    case.locator("summary").click()
    detail, command = case.locator("pre").all_inner_texts()
    assert detail == f"y: [2, 0]: expected 1.0 to 1.5, got 2.0\nscale: {printable(NASTY)}"
    assert command == (
        "polyfuse conformance --op a --backend mine --case wrong --level standard --device cuda"
        " --plugin mypackage:BACKEND"
    )
    assert "y: 4.000 of the bound at [2, 0]" in case.inner_text()
    assert page.locator("script").count() == 1


def shown(page):
    return page.locator("details.case:visible .name").all_inner_texts()


def test_the_filters_choose_cases(visit, path):
    page = visit(path)
    page.select_option("#status", "failed")
    assert shown(page) == ["wrong", "hangs"]
    assert page.locator("#shown").inner_text() == "2 shown"
    page.select_option("#status", "")
    page.select_option("#backend", "other")
    page.fill("#search", "small B")
    page.get_by_text("1 shown").wait_for()
    assert shown(page) == ["small core"]
    page.locator(".matrix a").first.click()
    page.get_by_text("11 shown").wait_for()
    assert len(shown(page)) == 5
    assert page.locator("#search").input_value() == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_is_legible_in_light_and_dark(visit, path, scheme):
    page = visit(path, width=390, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator(".matrix td").first.is_visible()
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert luminance(back) > 0.9 if scheme == "light" else luminance(back) < 0.05
    for selector in ("body", ".soft", ".verdict.conformant", ".verdict.failed", ".verdict.not-run", "pre", "a"):
        colour, behind = page.locator(selector).first.evaluate(COLOURS)
        one, other = sorted((luminance(colour), luminance(behind)))
        assert (other + 0.05) / (one + 0.05) >= 4.5, (selector, colour, behind)


COLOURS = """element => {
  let behind = element;
  while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
}"""


def luminance(colour):
    """The relative luminance of a CSS colour, as WCAG defines it."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_page_shows_every_case_without_a_script(visit, path):
    page = visit(path, java_script_enabled=False)
    assert page.locator("#tools").is_hidden()
    page.locator("details.group[data-op=b] summary").first.click()
    assert page.locator("details.group[data-op=b] .name").first.is_visible()


def test_a_run_that_was_cut_short_says_so_first(visit, tmp_path):
    page = visit(made("pp", state="interrupted", planned=9).write_file(tmp_path / "x.html"))
    assert page.locator(".banner").locator("p").all_inner_texts()[1:] == [
        "This run was interrupted.",
        "Only 2 of 9 planned results are here.",
        "Therefore nothing in it is conformant.",
    ]
    assert "partial" in page.locator(".matrix td").inner_text()


@pytest.mark.parametrize(
    ("report", "standing"),
    [
        (made("pp"), "conformant"),
        (made("pp", core=False), "partial"),
        (made("ss"), "partial"),
        (made("pf"), "failed"),
        (made("pp", state="running"), "partial"),
    ],
)
def test_the_banner_has_the_colour_of_the_least_verdict(report, standing, tmp_path):
    text = report.write_file(tmp_path / "x.html").read_text()
    assert f'<div class="banner {standing}">' in text


@pytest.mark.slow
def test_ten_thousand_results_make_a_page_that_opens_and_filters_at_once(visit, tmp_path):
    numbers = random.Random(0)
    report = Report("cpu (x86_64)", "full", 0, commit="abc")
    for op in ("one", "two"):
        report.results += [
            Result(
                op, "mine", f"bfloat16-hidden_{i}-gate_sliced-packed", "passed", 0.01,
                margins={"out": {"share": numbers.random(), "at": [i, 3]}}, core=i == 0,
            )
            for i in range(5000)
        ]  # fmt: skip
    report.planned = len(report.results)
    report.finish()
    path = report.write_file(tmp_path / "large.html")
    assert path.stat().st_size < 8_000_000
    page = visit(path)
    started = time.perf_counter()
    page.fill("#search", "hidden_4321-")
    page.get_by_text("2 shown").wait_for()
    assert time.perf_counter() - started < 5
    assert shown(page) == ["bfloat16-hidden_4321-gate_sliced-packed"] * 2


def test_a_long_message_is_cut_with_a_word_of_where_the_rest_is(tmp_path):
    report = made("p")
    report.results.append(Result("a", "mine", "long", "failed", detail="x" * 5000))
    text = report.write_file(tmp_path / "x.html").read_text()
    assert "x" * 2000 + "\n... and 3,000 characters in conformance.json" in text
    assert "x" * 2001 not in text
