"""Every kernel of the backend is launched by `_launch.Launch`, which knows how to do it quickly and right."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import polyfuse.triton_impl
from polyfuse.conformance import make_inputs, place
from polyfuse.conformance.cases import cases
from polyfuse.dispatch import registry
from polyfuse.spec import OPS
from polyfuse.triton_impl import _launch
from tests.triton_impl.helpers import DEVICE

ROOT = Path(polyfuse.triton_impl.__file__).parent
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
PACKAGE = "polyfuse.triton_impl"
DECORATORS = {"jit", "autotune", "heuristics"}


def is_kernel(node: ast.AST) -> bool:
    """Whether it is a function that Triton compiles, to launch it or to call it from another one."""
    if not isinstance(node, ast.FunctionDef):
        return False
    called = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return any(isinstance(d, ast.Attribute) and d.attr in DECORATORS for d in called)


def other_ways(sources: Mapping[str, str]) -> Iterator[str]:
    """Where host code of these modules mentions a kernel, but to make a `Launcher` of it: what could launch it too."""
    trees = {name: ast.parse(text) for name, text in sources.items() if name != "_launch"}
    kernels = {name: {node.name for node in tree.body if is_kernel(node)} for name, tree in trees.items()}
    for name, tree in trees.items():
        known = kernels[name].copy()
        modules: dict[str, set[str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                source = (node.module or "").removeprefix(PACKAGE).removeprefix(".")
                known |= {x.asname or x.name for x in node.names if x.name in kernels.get(source, ())}
                modules |= {x.asname or x.name: kernels.get(x.name, set()) for x in node.names if not source}
            elif isinstance(node, ast.Import):
                modules |= {
                    x.asname or x.name: kernels.get(x.name.removeprefix(f"{PACKAGE}."), set()) for x in node.names
                }
        yield from (f"{name}:{node.lineno}: {mentioned}" for node, mentioned in _mentions(tree, known, modules))


def _mentions(node: ast.AST, kernels: set[str], modules: Mapping[str, set[str]]) -> Iterator[tuple[Any, str]]:
    if is_kernel(node):
        return
    if isinstance(node, ast.FunctionDef):  # parameters and variables may have the names of kernels
        bound = {x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
        kernels = kernels - bound - {x.arg for x in ast.walk(node) if isinstance(x, ast.arg)}
    given = node.args if isinstance(node, ast.Call) and ast.unparse(node.func) == "Launcher" else []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Name) and child.id in kernels and child not in given:
            yield child, child.id
        elif isinstance(child, ast.Attribute) and child.attr in modules.get(ast.unparse(child.value), ()):
            yield child, child.attr
        else:
            yield from _mentions(child, kernels, modules)


def test_kernels_are_given_to_launchers_only() -> None:
    assert list(other_ways(SOURCES)) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("def op(x): _kernel[(1,)](x)", "_kernel"),
        ("def op(x): _kernel.run(x, grid=(1,), warmup=False)", "_kernel"),
        ("_started = _kernel", "_kernel"),
        ("import polyfuse.triton_impl.other as o\ndef op(x): o._kernel[(1,)](x)", "_kernel"),
        ("from polyfuse.triton_impl.other import _kernel as k\ndef op(x): k[(1,)](x)", "k"),
        ("_launch = Launcher(NAME, _kernel)\ndef op(x): [kernel[(1,)](x) for kernel in (_kernel,)]", "_kernel"),
    ],
)
def test_another_way_is_found(line: str, found: str) -> None:
    kernel = "@triton.jit(do_not_specialize=[])\ndef _kernel(x_ptr):\n    _part(x_ptr)\n"
    part = "@triton.jit\ndef _part(x_ptr):\n    pass\n"
    allowed = "_launch = Launcher(NAME, _kernel)\n"
    other = {"other": part + kernel + allowed}
    assert list(other_ways(other)) == []
    source = part + kernel.replace("_kernel", "_own") + line if "import" in line else part + kernel + line
    assert list(other_ways({**other, "op": source})) == [f"op:{len(source.splitlines())}: {found}"]


@pytest.mark.parametrize("op", OPS)
def test_every_op_comes_to_the_launch(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing launched: of the op's cases, those with elements reach a kernel of this backend."""
    backend = registry().get("triton")
    if backend.missing(op):
        pytest.skip("not an op of this backend")
    function = backend.load(op).function
    launched: list[Any] = []
    monkeypatch.setattr(_launch.Launch, "__call__", lambda self, grid, *arguments: launched.append(self.kernel))
    smallest = next(case for case in cases(op) if case.name in OPS[op].core)
    arguments = place(make_inputs(OPS[op], smallest), "torch", DEVICE)
    if "strategy" in arguments:
        arguments["strategy"] = "fused"
    with torch.no_grad():
        function(**arguments)
    assert launched
