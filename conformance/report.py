"""What a conformance run found: results, counts, and the JSON and JUnit files."""

import json
import platform
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("polyfuse", "numpy", "ml_dtypes", "torch", "triton", "jax", "jaxlib", "transformers"),
    *("flash-linear-attention", "flash-qla", "causal-conv1d"),
)


@dataclass(frozen=True)
class Result:
    """One case on one backend. `status` is `passed`, `failed`, `waived` or `skipped`; `detail` says why not passed.

    `waived` is a failure that the backend has declared, with its reason.
    """

    op: str
    backend: str
    case: str
    status: str
    seconds: float = 0.0
    detail: str = ""


@dataclass
class Report:
    """A run: where and with what it ran, and every result."""

    device: str
    profile: str
    seed: int
    versions: dict[str, str] = field(default_factory=lambda: versions())
    results: list[Result] = field(default_factory=list)

    def counts(self, op: str | None = None, backend: str | None = None) -> Counter[str]:
        """Number of results per status, over one op or backend or all."""
        chosen = (r for r in self.results if op in (None, r.op) and backend in (None, r.backend))
        return Counter(r.status for r in chosen)

    def conformant(self, backend: str) -> list[str]:
        """The ops of which a backend passed a case and failed none, in the run's order."""
        counts = {op: self.counts(op, backend) for op in dict.fromkeys(r.op for r in self.results)}
        return [op for op, count in counts.items() if count["passed"] > 0 and count["failed"] == 0]

    @property
    def ok(self) -> bool:
        """True if something ran and nothing failed."""
        counts = self.counts()
        return counts["passed"] > 0 and counts["failed"] == 0

    def as_dict(self) -> dict[str, Any]:
        conformant = {name: self.conformant(name) for name in dict.fromkeys(r.backend for r in self.results)}
        return {**asdict(self), "counts": dict(self.counts()), "conformant": conformant, "ok": self.ok}

    def write(self, folder: Path) -> list[Path]:
        """Write `conformance.json` and `junit.xml` into a folder; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "conformance.json", folder / "junit.xml"]
        files[0].write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        ET.ElementTree(self._junit()).write(files[1], encoding="utf-8", xml_declaration=True)
        return files

    def _junit(self) -> ET.Element:
        counts = self.counts()
        root = ET.Element(
            "testsuite",
            name="polyfuse conformance",
            tests=str(len(self.results)),
            failures=str(counts["failed"]),
            skipped=str(counts["skipped"] + counts["waived"]),
        )
        properties = ET.SubElement(root, "properties")
        facts = {"device": self.device, "profile": self.profile, "seed": str(self.seed)} | self.versions
        for name, value in facts.items():
            ET.SubElement(properties, "property", name=name, value=value)
        for r in self.results:
            case = ET.SubElement(
                root, "testcase", classname=f"{r.op}.{r.backend}", name=r.case, time=f"{r.seconds:.4f}"
            )
            if r.status != "passed":
                tag = "failure" if r.status == "failed" else "skipped"
                ET.SubElement(case, tag, message=r.detail)
        return root


def versions() -> dict[str, str]:
    """Versions of everything that decides a result."""
    found = {"python": platform.python_version(), "system": f"{sys.platform} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    """The device's own name, for reports."""
    if device == "cpu":
        import platform

        return f"cpu ({platform.machine()})"
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device
