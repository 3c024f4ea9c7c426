"""Runs the Triton backend's conformance at level quick under NVIDIA's compute-sanitizer, each tool on each op.

    python scripts/sanitize.py benchmarks/results/sanitizer_h200.json 15 [TOOL:OP ...]

The arguments are the file of the summary, how many processes go on at a time, and the runs; all of them where none is
named. A run that is named takes the place of what the file has of it. The cases of a run are dealt to processes of a
few each, as compute-sanitizer is slow; `left` is how many of them have no result. Without PyTorch's cache every tensor
is an allocation of its own, so that memcheck sees a step beside it and initcheck what nothing has written. Initcheck
looks at what kernels read, and not at copies to the host: a run copies whole results, with rows that the op's spec
leaves undefined, and compares these with nothing. Exit status 1 if a tool reports anything, a case fails or has no
result, or if the file lacks a run.
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

from polyfuse.conformance import selected_for
from polyfuse.spec import OPS

TOOLS = {"memcheck": ("--leak-check", "no"), "racecheck": (), "initcheck": ("--check-api-memory-access", "no")}
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
DEALT = 16  # cases of a process
LIMIT = 500.0  # seconds for a process


def main() -> int:
    """Write the summary as far as it is, and print a line for each process when it is done."""
    target, workers = Path(sys.argv[1]), int(sys.argv[2])
    version = subprocess.run([SANITIZER, "--version"], capture_output=True, text=True, check=True).stdout
    every = [(tool, op) for tool in TOOLS for op in OPS]
    named = [(tool, op) for tool, _, op in (name.partition(":") for name in sys.argv[3:])]
    known = json.loads(target.read_text(encoding="utf-8"))["runs"] if target.exists() and named else []
    runs = {(one["tool"], one["op"]): one for one in known if (one["tool"], one["op"]) not in named}
    summary: dict[str, Any] = {"compute-sanitizer": version.split("Version")[-1].split()[0]}
    with ThreadPoolExecutor(workers) as pool:
        dealt = [(tool, op, cases) for tool, op in named or every for cases in hands(op)]
        for made in as_completed([pool.submit(run, *one) for one in dealt]):
            found, report = made.result()
            name = found["tool"], found["op"]
            runs[name] = together(runs.get(name) or nothing(*name), found)
            summary |= {fact: report[fact] for fact in ("commit", "level", "chip", "versions") if fact in report}
            summary["runs"] = [runs[one] for one in every if one in runs]
            target.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            print(*[value for fact, value in found.items() if fact != "examples"], flush=True)
    clean = all(one["ok"] and not one["reports"] and not one["left"] for one in runs.values())
    return 0 if len(runs) == len(every) and clean else 1


def hands(op: str) -> list[list[str]]:
    """The names of an op's cases at level quick, as they are dealt to processes."""
    names = [case.name for case, left_out in selected_for(op, "quick") if not left_out]
    return [names[start :: -(-len(names) // DEALT)] for start in range(-(-len(names) // DEALT))]


def nothing(tool: str, op: str) -> dict[str, Any]:
    """A run of which no process has ended: all cases are left."""
    left = sum(map(len, hands(op)))
    counts = {"seconds": 0, "cases": {}, "left": left, "reports": 0, "kinds": {}}
    return {"tool": tool, "op": op, "ok": True, **counts, "examples": []}


def together(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A run with what one more of its processes has found."""
    sums = {name: one[name] + other[name] for name in ("seconds", "reports")}
    counts = {name: dict(Counter(one[name]) + Counter(other[name])) for name in ("cases", "kinds")}
    left = one["left"] - sum(other["cases"].values())
    examples = (one["examples"] + other["examples"])[:4]
    return {**one, **sums, **counts, "left": left, "ok": one["ok"] and other["ok"], "examples": examples}


def run(tool: str, op: str, cases: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """How often a tool reports something while some of an op's cases run, and what; and the report of the cases."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+", encoding="utf-8") as log:
        conformance = ["conformance", "--device", "cuda", "--level", "quick", "--backend", "triton", "--op", op]
        conformance += [word for case in cases for word in ("--case", case)]
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
        report: dict[str, Any] = (
            json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"results": [], "ok": False}
        )
    lines = [line for line in re.findall(r"^========= (\w.*)$", said, re.MULTILINE) if " SUMMARY" not in line]
    kinds = Counter(re.sub(r"0x[0-9a-f]+|\d+", "N", line) for line in lines if not line.startswith("COMPUTE-SANITIZER"))
    total = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", said)
    blocks = re.findall(
        r"^========= \w.*\n(?:=========  .*\n)*", said, re.MULTILINE
    )  # a report is indented but at first
    examples = [block for block in blocks if not re.match(r"========= (?:COMPUTE-SANITIZER|\w+ SUMMARY)", block)]
    if not report["ok"] or not total:
        examples.append(said[-1500:])  # why a process ended, or which cases failed
    found = {
        "tool": tool,
        "op": op,
        "seconds": round(time.monotonic() - began),
        "cases": dict(Counter(one["status"] for one in report["results"] if one["reason"] != "left_out")),
        "ok": report["ok"] and bool(total),
        "reports": int(total[-1]) if total else 0,
        "kinds": dict(kinds.most_common(8)),
        "examples": [text[:1500] for text in examples[:2]],
    }
    return found, report


if __name__ == "__main__":
    sys.exit(main())
