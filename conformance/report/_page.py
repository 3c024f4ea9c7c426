"""A report as one HTML page that needs nothing beside it, from `templates/report`."""

import math
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from polyfuse.conformance.report import _summary
from polyfuse.conformance.report._margins import AXIS, plots
from polyfuse.conformance.report._result import Result, Verdict
from polyfuse.conformance.report._text import number, printable, words

if TYPE_CHECKING:
    from polyfuse.conformance.report._report import Report

TEMPLATES = Path(__file__).parents[2] / "templates/report"
LONGEST_DETAIL = 2000  # characters; the JSON file has all
ORDER = ("failed", "waived", "passed", "skipped")


@dataclass(frozen=True)
class Group:
    """The cases of one op on one backend, failures first."""

    op: str
    backend: str
    verdict: Verdict
    counts: Mapping[str, int]
    results: list[Result]

    @property
    def anchor(self) -> str:
        """The id of its place on the page, which a link can name as it is."""
        return re.sub(r"[^A-Za-z0-9_.-]", "_", f"{self.op}--{self.backend}")


def page(report: "Report") -> str:
    """The page as HTML. Whatever a backend or an error says is shown as text: it can neither run nor load anything."""
    script = Markup((TEMPLATES / "page.js").read_text(encoding="utf-8"))
    digest = b64encode(sha256(script.encode()).digest()).decode()
    groups = _groups(report)
    return _environment().get_template("page.html.j2").render(
        report=report,
        script=script,
        script_hash=f"sha256-{digest}",
        style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        groups=groups,
        cells={(group.op, group.backend): group for group in groups},
        headline=_summary.headline(report),
        standing=_summary.standing(report),
        reservations=_summary.reservations(report),
        gaps=_summary.gaps(report),
        not_proven=_summary.not_proven(report),
        facts=_summary.facts(report),
        plots=plots(report),
        axis=AXIS,
        failed_checks=_failed_checks(report),
    )  # fmt: skip


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    filters: dict[str, Any] = {
        "percent": _summary.percent,
        "count": number,
        "words": words,
        "seconds": _seconds,
        "share": _share,
        "shortened": _shortened,
        "breakable": _breakable,
    }
    environment.filters.update(filters)
    return environment


def _groups(report: "Report") -> list[Group]:
    found: dict[tuple[str, str], list[Result]] = {}
    for result in report.results:
        found.setdefault((result.op, result.backend), []).append(result)
    verdicts = report.verdicts()
    return [
        Group(
            op, name, verdicts[op, name], report.counts(op, name),
            sorted(results, key=lambda r: ORDER.index(r.status)),
        )
        for (op, name), results in sorted(found.items(), key=lambda item: report.ops.index(item[0][0]))
    ]  # fmt: skip


def _failed_checks(report: "Report") -> dict[str, int]:
    """How many results each check failed."""
    found: dict[str, int] = {}
    for result in report.results:
        for name in result.checks:
            found[name] = found.get(name, 0) + 1
    return found


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _share(share: float | None) -> str:
    if share is None or not math.isfinite(share):
        return "not finite"
    return f"{share:.3f} of the bound" if 0.001 <= share < 100 or share == 0 else f"{share:.1e} of the bound"


def _shortened(detail: str) -> str:
    if len(detail) <= LONGEST_DETAIL:
        return detail
    return f"{detail[:LONGEST_DETAIL]}\n... and {number(len(detail) - LONGEST_DETAIL, 'character')} in conformance.json"


def _breakable(name: str) -> Markup:
    """A name that may go on in a new line after each underscore."""
    return escape(printable(name)).replace("_", Markup("_<wbr>"))
