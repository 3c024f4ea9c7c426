"""The verdict on outputs that somebody else's kernel wrote for golden vectors."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyfuse.conformance.checks.values import compare
from polyfuse.conformance.golden._export import PARTS, index
from polyfuse.conformance.golden._files import ANY, INDEX, MANIFEST, SCHEMA, SIGN, contents, inside, parse, read
from polyfuse.reference import Exact
from polyfuse.reference._numerics import F64, Array, to_f64
from polyfuse.spec import SpecError

_FINITE = float(np.finfo(np.float64).max)


@dataclass(frozen=True)
class Verdict:
    """What is wrong with the outputs of one case, `"op/case"`, a line for each; nothing if all are right."""

    case: str
    problems: tuple[str, ...]


def verify(folder: Path, outputs: Path) -> list[Verdict]:
    """The verdict on each case of the golden vectors in `folder`, whose outputs lie in `outputs`.

    An output is right exactly where `polyfuse.conformance.compare` says so of the oracle's interval. A file that is
    missing or no array of the result's dtype is a problem of its case, as is a file of the golden vectors that is not
    what was exported. Raises `SpecError` for a manifest that cannot be read, and for an index that is not its own.
    """
    manifest = _manifest(folder)
    try:
        if contents(folder / INDEX) != index(manifest["cases"]).encode():
            raise SpecError(f"{folder / INDEX}: does not belong to {MANIFEST}; export it again")
        return [
            Verdict(f"{entry['op']}/{entry['case']}", tuple(_problems(folder, outputs, entry)))
            for entry in manifest["cases"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"{folder / MANIFEST}: not the manifest of golden vectors: {error!r}") from error


def _manifest(folder: Path) -> Any:
    path = folder / MANIFEST
    try:
        manifest = json.loads(contents(path))
    except ValueError as error:
        raise SpecError(f"{path}: not JSON: {error}") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise SpecError(f"{path}: expected schema {SCHEMA}, got {schema!r}; export them again")
    return manifest


def _problems(folder: Path, outputs: Path, entry: Mapping[str, Any]) -> list[str]:
    found = []
    for array in entry["inputs"]:
        try:
            _checked(folder, array)
        except SpecError as error:
            found.append(f"{array['name']}: {error}")
    for result in entry["results"]:
        try:
            exact = expected(folder, result)
            got = read(inside(outputs, result["file"]), result["dtype"])
        except SpecError as error:
            found.append(f"{result['name']}: {error}")
            continue
        problem = compare(result["name"], got, exact, result["dtype"])
        if problem:
            found.append(problem)
    return found


def expected(folder: Path, result: Mapping[str, Any]) -> Exact:
    """The interval of a result, its ends rounded to the result's dtype. Raises `SpecError` for a damaged file."""
    dtypes = {"low": result["compared_as"], "high": result["compared_as"], "exact": "float64", "flags": "uint8"}
    arrays = {
        part: parse(_checked(folder, result[part]), dtypes[part], inside(folder, result[part]["file"]))
        for part in PARTS
        if part in result
    }
    value = arrays["exact"]
    flags = arrays.get("flags", np.zeros(value.shape, np.uint8))
    for part, array in arrays.items():
        if list(array.shape) != result["compared_shape"]:
            raise SpecError(f"{inside(folder, result[part]['file'])}: shape {list(array.shape)} is not the manifest's")
    low, high = _ends(arrays["low"], arrays["high"], flags & ANY > 0)
    parts = result["compared_as"] if result["compared_as"] != result["dtype"] else ""
    return Exact(value, low, high, parts=parts, kept=flags & SIGN > 0)


def _ends(low: Array, high: Array, anything: Any) -> tuple[F64, F64]:
    """Both ends, infinite where anything is right, and only there on both sides: elsewhere they only round so."""
    lower, upper = to_f64(low), to_f64(high)
    both = np.isneginf(lower) & np.isposinf(upper) & ~anything
    lower, upper = np.where(both, -_FINITE, lower), np.where(both, _FINITE, upper)
    return np.where(anything, -np.inf, lower), np.where(anything, np.inf, upper)


def _checked(folder: Path, file: Mapping[str, Any]) -> bytes:
    """The bytes of an exported file. Raises `SpecError` if they are not those that were exported."""
    path = inside(folder, file["file"])
    data = contents(path)
    if hashlib.sha256(data).hexdigest() != file["sha256"]:
        raise SpecError(f"{path}: changed since it was exported: its SHA-256 is not the manifest's")
    return data
