"""The tree is what the design says: six linked layers, one file name and one signature per op."""

import ast
import dataclasses
import importlib
import inspect
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import polyfuse
from polyfuse.reference import oracle
from polyfuse.reference._quantiser import Quantiser
from polyfuse.spec import OPS, REQUIRED

ROOT = Path(__file__).parents[1]
LAYERS = ("configs", "conformance", "reference", "spec", "torch_impl", "triton_impl")
IMPLEMENTATIONS = ("reference/jax", "reference/pallas", "torch_impl", "triton_impl")

REQUIRED_LAYERS = ("spec", "reference", "conformance/ops")

# By name: the kind, and the default as source ("" for none). Keyword parameters may stand in any order.
Parameters = dict[str, tuple[str, str]]


def op_files(folder: str) -> set[str]:
    """The names of a layer's files that are not its own helpers."""
    return {path.stem for path in (ROOT / folder).glob("*.py") if not path.name.startswith("_")}


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def python(code: str) -> str:
    """What `code` prints in a fresh interpreter started in the root folder."""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def imported_names(path: Path) -> Iterator[str]:
    """Every module that a file imports; a relative import as its dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def parsed_parameters(path: Path, function: str) -> Parameters:
    body = ast.parse(path.read_text()).body
    found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == function]
    assert len(found) == 1, f"{path}: expected one top-level function {function}, got {len(found)}"
    args = found[0].args
    assert not args.vararg, f"{path}: {function} takes *args"
    assert not args.kwarg, f"{path}: {function} takes **kwargs"
    positional = [(a, "POSITIONAL_ONLY") for a in args.posonlyargs] + [(a, "POSITIONAL_OR_KEYWORD") for a in args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults + args.kw_defaults
    everything = positional + [(a, "KEYWORD_ONLY") for a in args.kwonlyargs]
    return {
        arg.arg: (kind, ast.unparse(default) if default else "")
        for (arg, kind), default in zip(everything, defaults, strict=True)
    }


def parameters(function: Callable[..., object]) -> Parameters:
    return {
        p.name: (p.kind.name, "" if p.default is p.empty else repr(p.default))
        for p in inspect.signature(function).parameters.values()
    }


def specified_parameters(op: str) -> Parameters:
    found = {}
    for name, default in OPS[op].parameters.items():
        kind = "POSITIONAL_OR_KEYWORD" if name in OPS[op].positional else "KEYWORD_ONLY"
        found[name] = (kind, "" if default is REQUIRED else repr(default))
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_is_a_link_to_the_root_folder(layer: str) -> None:
    link = ROOT / "src/polyfuse" / layer
    assert link.is_symlink()
    assert link.readlink() == Path("../..", layer)
    assert link.resolve() == (ROOT / layer).resolve()
    assert (link / "__init__.py").is_file()


def test_links_are_tracked() -> None:
    if (ROOT / ".git").exists() and shutil.which("git"):
        listing = subprocess.check_output(["git", "ls-files", "-s", "src/polyfuse"], cwd=ROOT, text=True)
        entries = [line.split() for line in listing.splitlines()]
        links = [path for mode, _, _, path in entries if mode == "120000"]
    else:
        links = [f"src/polyfuse/{e.name}" for e in os.scandir(ROOT / "src/polyfuse") if e.is_symlink()]
    assert sorted(links) == sorted(f"src/polyfuse/{linked}" for linked in (*LAYERS, "templates"))


@pytest.mark.parametrize("folder", REQUIRED_LAYERS)
def test_every_op_has_its_required_files(folder: str) -> None:
    assert op_files(folder) == set(OPS)


@pytest.mark.parametrize("folder", IMPLEMENTATIONS)
def test_a_backend_has_files_of_ops_only(folder: str) -> None:
    assert op_files(folder) <= set(OPS)


@pytest.mark.parametrize(
    ("folder", "op"), [(folder, op) for folder in IMPLEMENTATIONS for op in sorted(op_files(folder))]
)
def test_a_backends_signature_is_that_of_the_spec(folder: str, op: str) -> None:
    assert parsed_parameters(ROOT / folder / f"{op}.py", op) == specified_parameters(op)


@pytest.mark.parametrize("op", OPS)
def test_the_oracles_formula_takes_the_parameters_of_the_spec(op: str) -> None:
    expected = {name: kind for name, (kind, _) in specified_parameters(op).items()}
    formula = parameters(importlib.import_module(f"polyfuse.reference.{op}").formula)
    found = {name: kind for name, (kind, _) in formula.items()}
    if found.pop("quantiser", None) == "VAR_KEYWORD":  # They make a `Quantiser`, whose fields are the names.
        found |= {field.name: "KEYWORD_ONLY" for field in dataclasses.fields(Quantiser)}
    assert found == expected
    assert parameters(oracle(op)) == specified_parameters(op)


@pytest.mark.parametrize("op", OPS)
def test_the_public_function_adds_backend(op: str) -> None:
    backend = {"backend": ("KEYWORD_ONLY", "None")}
    assert parameters(getattr(polyfuse, op)) == specified_parameters(op) | backend


def test_source_files_are_short() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in sources(*LAYERS, "src")}
    written = {path: n for path, n in lines.items() if path.name not in ("__init__.py", "_ops.py")}
    longest_first = sorted(written.items(), key=lambda item: -item[1])
    assert statistics.median(written.values()) <= 150, longest_first[:10]
    assert longest_first[0][1] <= 400, longest_first[:3]


@pytest.mark.parametrize("folder", [*LAYERS, "src", "tests"])
def test_imports_are_absolute_and_through_polyfuse(folder: str) -> None:
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(folder)
        for name in imported_names(path)
        if name.startswith(".") or name.split(".")[0] in LAYERS
    }
    assert not wrong


@pytest.mark.parametrize("layer", [*LAYERS, "reference.jax", "reference.pallas"])
def test_wrong_identity_is_refused(layer: str) -> None:
    code = f"try: import {layer}\nexcept ImportError as error: print(error)\nelse: print('imported')"
    assert f"import polyfuse.{layer.split('.')[0]}" in python(code)


def test_spec_imports_the_standard_library_only() -> None:
    allowed = {*sys.stdlib_module_names, "polyfuse.spec"}
    wrong = {
        f"{path.name}: {name}"
        for path in sources("spec")
        for name in imported_names(path)
        if not {name, name.split(".")[0], ".".join(name.split(".")[:2])} & allowed
    }
    assert not wrong
    loaded = python("import sys, polyfuse.spec; print(*sys.modules)").split()
    assert "polyfuse.spec" in loaded
    assert {"numpy", "ml_dtypes", "torch", "jax", "triton"}.isdisjoint(loaded)
