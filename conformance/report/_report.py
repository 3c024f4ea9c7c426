"""A conformance run: where and with what it ran, every result, and what the results prove."""

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

from polyfuse.conformance.report import _facts, _files
from polyfuse.conformance.report._facts import BackendFacts
from polyfuse.conformance.report._result import STRICT, Result, Verdict
from polyfuse.conformance.report._text import number, words

SCHEMA = 2
State = Literal["running", "complete", "interrupted"]


def now() -> str:
    """The time in UTC, to the second, as ISO 8601 writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Report:
    """A run and its results. `state` is `running` until `finish` is called: such a report proves nothing yet.

    `proves` is what the level says that it proves. `filters` holds what chose among the cases
    (`{"cases": [patterns]}`); choosing ops or backends is no filter. `planned` is the number of results of the whole
    run, `checks` what each check that ran proves, and `command` the command line, of a merged report a line for each
    part. docs/reports.md describes every field.
    """

    __pydantic_config__: ClassVar = STRICT

    device: str
    level: str
    seed: int
    proves: str = ""
    command: str = ""
    filters: Mapping[str, list[str]] = field(default_factory=dict)
    started: str = field(default_factory=now)
    finished: str = ""
    state: State = "running"
    commit: str | None = field(default_factory=_facts.commit)
    versions: Mapping[str, str] = field(default_factory=_facts.versions)
    chip: Mapping[str, str] = field(default_factory=dict)
    backends: Mapping[str, BackendFacts] = field(default_factory=dict)
    spec_versions: Mapping[str, int] = field(default_factory=dict)
    checks: Mapping[str, str] = field(default_factory=dict)
    planned: int = 0
    results: list[Result] = field(default_factory=list)

    def finish(self, state: State = "complete") -> None:
        """Say that no result comes any more, and whether all have come."""
        self.state, self.finished = state, now()

    @property
    def ops(self) -> list[str]:
        """The ops of the results, in the run's order."""
        return list(dict.fromkeys(r.op for r in self.results))

    @property
    def backend_names(self) -> list[str]:
        """The backends of the results, in the run's order."""
        return list(dict.fromkeys(r.backend for r in self.results))

    @property
    def complete(self) -> bool:
        """True if the run has ended of itself and every planned result is there."""
        return self.state == "complete" and len(self.results) >= self.planned

    def counts(self, op: str | None = None, backend: str | None = None) -> Counter[str]:
        """Number of results per status, over one op or backend or all."""
        chosen = (r for r in self.results if op in (None, r.op) and backend in (None, r.backend))
        return Counter(r.status for r in chosen)

    def verdict(self, op: str, backend: str) -> Verdict:
        """What the results prove of one op on one backend."""
        return self.verdicts().get((op, backend), Verdict("not run", "no case ran", 0, 0))

    def verdicts(self) -> dict[tuple[str, str], Verdict]:
        """The verdict on every (op, backend) that has results."""
        found: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            found.setdefault((result.op, result.backend), []).append(result)
        return {key: self._verdict(results) for key, results in found.items()}

    def _verdict(self, results: list[Result]) -> Verdict:
        counts = Counter(r.status for r in results)
        asked = [r for r in results if r.reason not in ("left_out", "too_large")]
        claimed = sum(r.reason not in ("unclaimed", "unavailable") for r in asked)
        if counts["failed"]:
            return Verdict("failed", f"{number(counts['failed'], 'case')} failed", claimed, len(asked))
        if not counts["passed"]:
            return Verdict("not run", _why_not_run(results), claimed, len(asked))
        gaps = self._gaps(results)
        if gaps:
            return Verdict("partial", "; ".join(gaps), claimed, len(asked))
        waived = f", {counts['waived']} waived" if counts["waived"] else ""
        return Verdict("conformant", f"all core cases and nothing failed{waived}", claimed, len(asked))

    def _gaps(self, results: list[Result]) -> list[str]:
        """What is missing from a proof that has no failure."""
        found = []
        if self.state != "complete":
            found.append("the run was interrupted" if self.state == "interrupted" else "the run has not ended")
        elif not self.complete:
            found.append(f"{len(self.results)} of {self.planned} planned results are there")
        if self.filters.get("cases"):
            found.append("a filter chose the cases")
        core = [r for r in results if r.core]
        if not core:
            found.append("no core case among the results")
        if left_out := sum(r.reason == "left_out" for r in core):
            found.append(f"{number(left_out, 'core case')} left out")
        for r in core:
            if r.status != "passed" and r.reason != "left_out":
                found.append(f"core case {r.case} {words(r.reason) or r.status}")
        return found

    def conformant(self, backend: str) -> list[str]:
        """The ops on which a backend is conformant, in the run's order."""
        found = self.verdicts()
        return [op for (op, name), verdict in found.items() if name == backend and verdict.status == "conformant"]

    @property
    def ok(self) -> bool:
        """True if the run is complete, something passed and nothing failed."""
        counts = self.counts()
        return self.complete and counts["passed"] > 0 and counts["failed"] == 0

    def as_dict(self) -> dict[str, Any]:
        """The report as its JSON file has it: the fields, and what follows from them."""
        verdicts = [
            {"op": op, "backend": name, "status": v.status, "why": v.why, "claimed": v.claimed, "asked": v.asked}
            for (op, name), v in self.verdicts().items()
        ]
        conformant = {name: self.conformant(name) for name in self.backend_names}
        derived = {"counts": dict(self.counts()), "conformant": conformant, "verdicts": verdicts, "ok": self.ok}
        return {"schema": SCHEMA, **derived, **asdict(self)}

    def rerun(self, result: Result) -> str:
        """The command that runs a result's case again."""
        command = ["polyfuse", "conformance", "--op", result.op, "--backend", result.backend, "--case", result.case]
        command += ["--level", self.level, "--device", self.device.partition(" ")[0], *self._plugins]
        return shlex.join(command)

    @property
    def _plugins(self) -> list[str]:
        """The options of the run's command that add backends."""
        found = dict.fromkeys(re.findall(r"--plugin[ =](\S+)", self.command))
        return [word for plugin in found for word in ("--plugin", plugin)]

    @property
    def _itself(self) -> Any:
        """The report without its type: pyright takes that of the linked module for another one."""
        return self

    def save(self, folder: Path) -> Path:
        """Write `conformance.json` alone, for a run that goes on; returns its path."""
        return _files.save(self._itself, folder)

    def write(self, folder: Path) -> list[Path]:
        """Write `conformance.json`, `junit.xml`, `conformance.md` and `conformance.html`; returns their paths."""
        return _files.write(self._itself, folder)

    def write_file(self, path: Path) -> Path:
        """Write one file, of the kind that its suffix names: `.json`, `.xml`, `.md` or `.html`; returns its path.

        Raises `SpecError` for another suffix.
        """
        return _files.write_file(self._itself, path)


def _why_not_run(results: list[Result]) -> str:
    """Why nothing passed and nothing failed: the one reason, or how often each."""
    details = {r.detail for r in results}
    if len(details) == 1:
        return details.pop() or "no case ran"
    reasons = Counter(r.reason or r.status for r in results)
    return ", ".join(f"{count} {words(reason)}" for reason, count in reasons.items())
