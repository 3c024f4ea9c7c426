"""The picture of every op: its steps name all arrays of the op, and the drawing is readable and committed."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from polyfuse.spec import OPS, op_picture
from polyfuse.spec._types import Step

FOLDER = Path(__file__).parents[2] / "docs" / "ops"


@pytest.mark.parametrize("op", OPS)
def test_the_steps_name_every_array_once(op):
    spec = OPS[op]
    assert len(spec.steps) >= 2
    assert sorted(name for step in spec.steps for name in step.reads) == sorted(t.name for t in spec.tensors)
    given = sorted([*(o.name for o in spec.outputs), *spec.updated])
    assert sorted(name for step in spec.steps for name in step.gives) == given


@pytest.mark.parametrize("op", OPS)
def test_the_picture_is_committed(op):
    assert (FOLDER / f"{op}.svg").read_text(encoding="utf-8") == op_picture(OPS[op]), "run: make docs"


def test_no_picture_without_an_op():
    assert {path.stem for path in FOLDER.glob("*.svg")} == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_texts_stay_beside_the_box_and_apart(op):
    tree = ElementTree.fromstring(op_picture(OPS[op]))
    boxes = {e.get("class"): e for e in tree.iter("{http://www.w3.org/2000/svg}rect")}
    left = float(boxes["step"].get("x"))
    right = left + float(boxes["step"].get("width"))
    rows: dict[tuple[str, str], list[float]] = {}
    for text in tree.iter("{http://www.w3.org/2000/svg}text"):
        x, y, words = float(text.get("x")), float(text.get("y")), text.text
        rows.setdefault((text.get("class"), text.get("text-anchor")), []).append(y)
        if text.get("class") == "name":  # 6.7 pixels are a letter of a monospace font of 11
            assert x + 6.7 * len(words) < left if text.get("text-anchor") == "start" else x - 6.7 * len(words) > right
        elif text.get("class") == "":
            assert 6.2 * len(words) <= right - left + 8, words
    for ys in rows.values():
        assert all(b - a >= 14 for a, b in zip(sorted(ys), sorted(ys)[1:], strict=False))


def test_a_picture_escapes_and_marks():
    spec = replace(OPS["gdn_decode"], steps=(Step("a < b & c", ("z",), ("conv_state",)),))
    picture = op_picture(spec)
    assert "a &lt; b &amp; c" in picture
    assert re.search(r'class="way optional"', picture)
    assert ">conv_state*<" in picture
    assert "prefers-color-scheme: dark" in picture
