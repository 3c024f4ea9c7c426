"""Cases of ops as files: inputs, and for every result the rounded ends of each element's interval."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

import polyfuse
from polyfuse.conformance.case import Case
from polyfuse.conformance.cases import all_cases, cases
from polyfuse.conformance.golden._files import ANY, INDEX, MANIFEST, SCHEMA, SIGN, VERIFIER, stored_dtype, write
from polyfuse.conformance.inputs import make_inputs
from polyfuse.reference import Exact, oracle
from polyfuse.reference._numerics import Array, round_to
from polyfuse.spec import OPS, OpSpec, Output, SpecError, bind, canonical

CHOICES = ("core", "all")
PARTS = ("low", "high", "exact", "flags")  # the files that a result is compared with


@dataclass(frozen=True)
class Exported:
    """What was written: `"op/case"` of each case, those `left_out` with the reason, and the size in bytes."""

    cases: tuple[str, ...]
    left_out: Mapping[str, str]
    size: int


def export(
    folder: Path,
    ops: Sequence[str] = (),
    *,
    choice: str = "core",
    names: Sequence[str] = (),
    seed: int = 0,
    max_elements: int = 1_000_000,
    on_case: Callable[[str], object] = lambda name: None,
) -> Exported:
    """Write golden vectors of ops, all of them unless `ops` names some, into a folder that is empty or not there.

    `choice` is `"core"`, the cases without which a backend does not have the op, or `"all"`; `names` are patterns, such
    as `"bfloat16-*"`, that choose among all cases instead. Cases of more than `max_elements` elements in inputs and
    results are left out. `on_case(name)` is called before a case is written. Raises `SpecError` for a folder with files
    in it and for names that nothing has.
    """
    if choice not in CHOICES:
        raise SpecError(f"cases: expected one of {', '.join(CHOICES)}, got {choice!r}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpecError(f"{folder}: expected an empty folder, or none")
    chosen = {op: _chosen(OPS[op], choice, names) for op in map(canonical, ops or OPS)}
    if not any(chosen.values()):
        raise SpecError(f"case: expected a pattern that a case of {', '.join(chosen)} has, got {', '.join(names)}")
    written, left_out = [], {}
    for op, some in chosen.items():
        for case in some:
            entry = Entry(folder, op, case, seed)
            if entry.elements > max_elements:
                left_out[entry.name] = f"{entry.elements} elements, more than {max_elements}"
            else:
                on_case(entry.name)
                written.append(entry.write())
    text = index(written).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).write_bytes(text)
    (folder / VERIFIER).write_bytes(Path(__file__).with_name(VERIFIER).read_bytes())
    manifest = {
        "schema": SCHEMA,
        "polyfuse": polyfuse.__version__,
        "seed": seed,
        "cases": written,
        "left_out": left_out,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Exported(tuple(f"{entry['op']}/{entry['case']}" for entry in written), left_out, size)


def _chosen(spec: OpSpec, choice: str, names: Sequence[str]) -> list[Case]:
    if names:
        return [case for case in all_cases(spec.name) if any(fnmatchcase(case.name, name) for name in names)]
    if choice == "all":
        return list(all_cases(spec.name))
    return [case for case in cases(spec.name) if case.name in spec.core]


class Entry:
    """One case, and its part of the manifest."""

    def __init__(self, folder: Path, op: str, case: Case, seed: int) -> None:
        self.root, self.op, self.case = folder, op, case
        self.name = f"{op}/{case.name}"
        self.folder = _folder(op, case.name)
        self.values = make_inputs(OPS[op], case, seed)
        self.call = bind(OPS[op], self.values)
        self.arrays = {name: value for name, value in self.values.items() if isinstance(value, np.ndarray)}
        results = sum(int(np.prod(output.shape)) for output in self.call.results)
        self.elements = sum(array.size for array in self.arrays.values()) + results

    def write(self) -> dict[str, Any]:
        """Write the case's arrays; returns what the manifest says of it."""
        spec = OPS[self.op]
        exact = oracle(self.op).intervals(**self.values)
        given = {t.name: self.values[t.name] for t in spec.tensors}
        return {
            "op": self.op,
            "case": self.case.name,
            "spec_version": spec.version,
            "attributes": {name: _plain(value) for name, value in self.call.attrs.items()},
            "host": {name: value for name, value in given.items() if isinstance(value, (tuple, list))},
            "absent": [name for name, value in given.items() if value is None],
            "inputs": [self._input(name, array) for name, array in self.arrays.items()],
            "results": [self.result(output, exact[output.name]) for output in self.call.results],
        }

    def _input(self, name: str, array: Array) -> dict[str, Any]:
        return {
            "name": name,
            "dtype": array.dtype.name,
            "stored_as": stored_dtype(array.dtype.name).str,
            "shape": array.shape,
            "updated": name in OPS[self.op].updated,
            **self._file(f"in/{name}.npy", array),
        }

    def result(self, output: Output, exact: Exact) -> dict[str, Any]:
        """Write what one result is compared with; returns what the manifest says of it."""
        dtype = exact.parts or output.dtype
        flags = np.where(np.isneginf(exact.low) & np.isposinf(exact.high), ANY, 0)
        flags |= SIGN * (exact.bits | (False if exact.kept is None else exact.kept))
        with np.errstate(invalid="ignore", over="ignore"):
            files = {
                "low": self._file(f"expected/{output.name}.low.npy", round_to(exact.low, dtype)),
                "high": self._file(f"expected/{output.name}.high.npy", round_to(exact.high, dtype)),
                "exact": self._file(f"expected/{output.name}.exact.npy", exact.value),
            }
        if flags.any():
            files["flags"] = self._file(f"expected/{output.name}.flags.npy", flags.astype(np.uint8))
        return {
            "name": output.name,
            "dtype": output.dtype,
            "stored_as": stored_dtype(output.dtype).str,
            "shape": output.shape,
            "updated": output.name in OPS[self.op].updated,
            "file": f"{self.folder}/{output.name}.npy",
            "compared_as": dtype,
            "compared_shape": exact.value.shape,
            **files,
        }

    def _file(self, name: str, array: Array) -> dict[str, str]:
        file = f"{self.folder}/{name}"
        return {"file": file, "sha256": write(self.root / file, array)}


def _folder(op: str, case: str) -> str:
    """The folder of a case, in which a name has no characters that a file system or a line of words minds."""
    return f"{op}/{quote(case, safe='+=,')}"


def _plain(value: Any) -> Any:
    """An attribute as JSON has it: a float that is not finite is its name."""
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def index(entries: Sequence[Mapping[str, Any]]) -> str:
    """What a verdict needs of the manifest, a line for each fact: C reads it without a JSON parser."""
    lines = [f"polyfuse-golden {SCHEMA}"]
    for entry in entries:
        lines.append(f"case {_folder(entry['op'], entry['case'])}")
        lines += [f"input {array['name']} {array['file']} {array['sha256']}" for array in entry["inputs"]]
        for result in entry["results"]:
            lines.append(f"result {result['name']} {result['dtype']} {result['compared_as']} {result['file']}")
            lines += [f"{part} {result[part]['file']} {result[part]['sha256']}" for part in PARTS if part in result]
    return "\n".join([*lines, f"end {len(entries)}", ""])
