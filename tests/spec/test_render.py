"""The committed pages are what the specs say today."""

from pathlib import Path

import pytest

from polyfuse.spec import OPS, op_page

FOLDER = Path(__file__).parents[2] / "docs" / "ops"


@pytest.mark.parametrize("op", OPS)
def test_the_page_is_up_to_date(op):
    assert (FOLDER / f"{op}.md").read_text(encoding="utf-8") == op_page(OPS[op]), "run: make docs"


def test_no_page_without_an_op():
    assert {p.stem for p in FOLDER.glob("*.md")} == set(OPS)
