"""The committed pages are what the specs say today."""

import inspect
import re
from pathlib import Path

import pytest

import polyfuse
from polyfuse.spec import OPS, op_page

FOLDER = Path(__file__).parents[2] / "docs" / "ops"


@pytest.mark.parametrize("op", OPS)
def test_the_page_is_up_to_date(op):
    assert (FOLDER / f"{op}.md").read_text(encoding="utf-8") == op_page(OPS[op]), "run: make docs"


@pytest.mark.parametrize("op", OPS)
def test_nothing_on_a_page_is_emphasised_by_mistake(op):
    outside = re.sub(r"^```.*?^```$|`[^`\n]+`", "", op_page(OPS[op]), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"\*\*\S.*\S\*\*", outside), "as 2**-126 to 2**127, of which Markdown makes bold type"


@pytest.mark.parametrize("op", OPS)
def test_the_page_shows_the_signature(op):
    shown = op_page(OPS[op]).partition(f"polyfuse.{op}")[2].partition("->")[0]
    function = getattr(polyfuse, op)
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    signature = str(inspect.Signature(parameters))
    assert " ".join(shown.split()) == signature.replace("'", '"')


def test_no_page_without_an_op():
    assert {p.stem for p in FOLDER.glob("*.md")} == set(OPS)
