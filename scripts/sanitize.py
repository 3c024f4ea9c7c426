"""Runs the Triton backend's conformance at level quick under NVIDIA's compute-sanitizer, each tool on each op.

    python scripts/sanitize.py benchmarks/results/sanitizer_h200.json 12 [TOOL:OP ...]

The arguments are the file of the summary, how many runs go on at a time, and the runs; all of them where none is
named. A run that is named takes the place of what the file has of it. Without PyTorch's cache every tensor is an
allocation of its own, so that memcheck sees a step beside it and initcheck what nothing has written. Of initcheck,
`copies` are the elements that no kernel has written where a run copies a whole result to the host: rows that the op's
spec leaves undefined, which the conformance compares with nothing. `reports` are all others. Exit status 1 if a tool
reports anything or a case fails, or if the file lacks a run.
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
COPY = "Host API memory access error at host access"  # how initcheck's reports of copies to the host begin


def main() -> int:
    """Write the summary, and print a line for each run when it is done."""
    target, workers = Path(sys.argv[1]), int(sys.argv[2])
    version = subprocess.run([SANITIZER, "--version"], capture_output=True, text=True, check=True).stdout
    every = [(tool, op) for tool in TOOLS for op in OPS]
    named = [(tool, op) for tool, _, op in (name.partition(":") for name in sys.argv[3:])]
    known = json.loads(target.read_text(encoding="utf-8"))["runs"] if target.exists() and named else []
    runs = {(one["tool"], one["op"]): one for one in known}
    summary: dict[str, Any] = {"compute-sanitizer": version.split("Version")[-1].split()[0]}
    with ThreadPoolExecutor(workers) as pool:
        for made in as_completed([pool.submit(run, tool, op) for tool, op in named or every]):
            found, report = made.result()
            summary |= {name: report[name] for name in ("commit", "level", "chip", "versions") if name in report}
            runs[found["tool"], found["op"]] = found
            summary["runs"] = [runs[name] for name in every if name in runs]
            target.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")  # as far as it is
            print(*list(found.values())[:-1], flush=True)
    return 0 if len(runs) == len(every) and all(one["ok"] and one["reports"] == 0 for one in runs.values()) else 1


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
    copies = sum(count for kind, count in kinds.items() if kind.startswith(COPY)) if tool == "initcheck" else 0
    found |= {"reports": int(total[-1]) - copies if total else None, "copies": copies}
    found |= {"kinds": dict(kinds.most_common(8))}
    blocks = re.findall(r"(?:^=========.*\n)+", said, re.MULTILINE)  # a report is lines behind one another
    examples = [
        block
        for block in blocks
        if COPY not in block and not re.match(r"========= (?:COMPUTE-SANITIZER\n\Z|\w+ SUMMARY)", block)
    ]
    if not report["ok"]:
        examples.append(said[-1500:])  # why a run ended, or which cases failed
    return {**found, "examples": [text[:1500] for text in examples[:3] + examples[3:][-1:]]}, report


if __name__ == "__main__":
    sys.exit(main())
