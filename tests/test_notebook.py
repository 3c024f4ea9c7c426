"""examples/quickstart.ipynb runs, and shows what it prints."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot
import pytest

import polyfuse

ROOT = Path(__file__).parents[1]
NOTEBOOK: dict[str, Any] = json.loads((ROOT / "examples/quickstart.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def shown(cell: dict[str, Any]) -> str:
    return "".join(line for output in cell["outputs"] if output["output_type"] == "stream" for line in output["text"])


def test_it_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matplotlib.pyplot, "show", lambda: print(end=""))
    polyfuse.refresh()
    names: dict[str, Any] = {"__name__": "__main__"}
    with matplotlib.rc_context({"backend": "agg"}):
        for number, cell in enumerate(CODE):
            out, source = io.StringIO(), "".join(cell["source"])
            with contextlib.redirect_stdout(out):
                exec(compile(source, f"cell {number}", "exec"), names)
            assert out.getvalue() == shown(cell), source
    matplotlib.pyplot.close(names["figure"])
    assert [axis.get_title() for axis in names["axes"]] == ["16 x 16", "12 x 40", "32 x 20"]


def test_its_figure_is_stored_and_nothing_else_but_text() -> None:
    kinds = [(output["output_type"], cell) for cell in CODE for output in cell["outputs"]]
    (figure,) = [cell for kind, cell in kinds if kind != "stream"]
    assert figure is CODE[-1]
    assert {kind for kind, _ in kinds} == {"stream", "display_data"}
    assert [list(output["data"]) for output in figure["outputs"]] == [["image/png", "text/plain"]]


def test_its_links_lead_somewhere() -> None:
    texts = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown"]
    targets = [part.split(")")[0] for text in texts for part in text.split("](")[1:]]
    assert len(targets) > 3
    assert all((ROOT / "examples" / target).is_file() for target in targets)
