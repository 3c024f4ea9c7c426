"""Runs the Triton backend's conformance at level quick under NVIDIA's compute-sanitizer, each tool on each op.

    python scripts/sanitize.py benchmarks/results/sanitizer_h200.json 12

The arguments are the file of the summary and how many runs go on at a time. Without PyTorch's cache every tensor is an
allocation of its own, so that memcheck sees a step beside it and initcheck what nothing has written. Exit status 1 if
a tool reports anything or a case fails.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

from polyfuse.spec import OPS

TOOLS = {"memcheck": ("--leak-check", "no"), "initcheck": (), "racecheck": ()}
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
LIMIT = 500.0  # seconds for a run


def main() -> int:
    """Write the summary, and print a line for each run when it is done."""
    target, workers = Path(sys.argv[1]), int(sys.argv[2])
    version = subprocess.run([SANITIZER, "--version"], capture_output=True, text=True, check=True).stdout
    summary: dict[str, Any] = {"compute-sanitizer": version.split("Version")[-1].split()[0], "runs": []}
    with ThreadPoolExecutor(workers) as pool:
        for made in as_completed([pool.submit(run, tool, op) for tool in TOOLS for op in OPS]):
            found, report = made.result()
            summary |= {name: report[name] for name in ("commit", "level", "chip", "versions") if name in report}
            summary["runs"].append(found)
            target.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")  # as far as it is
            print(*found.values(), flush=True)
    return 0 if all(one["ok"] and one["reports"] == 0 for one in summary["runs"]) else 1


def run(tool: str, op: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """How often a tool reports something while an op's cases run, and what; and the report of the cases."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+", encoding="utf-8") as log:
        conformance = ["conformance", "--device", "cuda", "--level", "quick", "--backend", "triton", "--op", op]
        limit = ["-j", "0", "--time-limit", str(LIMIT), "--report", folder]
        command = [SANITIZER, "--tool", tool, *TOOLS[tool], "--target-processes", "all", "--print-limit", "100000"]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [*command, sys.executable, "-m", "polyfuse", *conformance, *limit],
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT, check=False,
            )  # fmt: skip
        log.seek(0)
        said = log.read()
        file = Path(folder) / "conformance.json"
        report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"counts": {}, "ok": False}
    lines = [line for line in re.findall(r"^========= (\w.*)$", said, re.MULTILINE) if " SUMMARY" not in line]
    kinds = Counter(re.sub(r"0x[0-9a-f]+|\d+", "N", line) for line in lines if not line.startswith("COMPUTE-SANITIZER"))
    total = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", said)
    seconds = round(time.monotonic() - began)
    found = {"tool": tool, "op": op, "seconds": seconds, "cases": report["counts"], "ok": report["ok"]}
    return {**found, "reports": int(total[-1]) if total else None, "kinds": dict(kinds.most_common(8))}, report


if __name__ == "__main__":
    sys.exit(main())
