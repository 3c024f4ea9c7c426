"""The committed report of the Numba example: that it is as its README says, and what it keeps quiet."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/polyfuse-numba"
PAGE = (EXAMPLE / "report/conformance.html").read_text(encoding="utf-8")


def test_the_readme_gives_the_command_of_the_report():
    (command,) = re.findall(r"^\$ (polyfuse conformance .*--report report)$", (EXAMPLE / "README.md").read_text(), re.M)
    assert command in PAGE


def test_it_is_of_a_whole_run_without_failures():
    assert "Conformance of numba on " in PAGE
    assert re.search(r"3 of 4 pairs of op and backend conformant, 1 partial\.\s*Cases: \d+ passed, 0 failed", PAGE)


def test_it_names_no_path_or_host():
    assert not re.search(r"(?<![\w.])/(?:work|tmp|root|home|usr|opt)/", PAGE)


def test_report_and_picture_are_small():
    assert len(PAGE.encode()) < 1_000_000
    picture = (ROOT / "docs/conformance_report.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 200_000
