"""docs/compat.md lists every function of `polyfuse.compat`, its op, and what it refuses."""

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from polyfuse.compat import sglang, vllm

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/compat.md").read_text(encoding="utf-8")


def rows(engine: str) -> dict[str, tuple[str, str]]:
    """Of each function in an engine's table the op and what differs."""
    (table,) = re.findall(rf"^\| {engine} \| op \|.*\n\|---.*\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE)
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return {name.strip("`"): (op, differs) for name, op, differs in cells}


def called(function: object) -> set[str]:
    """The functions of polyfuse that a function calls: `polyfuse.<op>`, or a name that it imports from the runtime."""
    tree = ast.parse(inspect.getsource(function))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    ops = {f.attr for f in calls if isinstance(f, ast.Attribute) and ast.unparse(f.value) == "polyfuse"}
    return ops | {f.id for f in calls if isinstance(f, ast.Name) and f.id == "execute_in_parallel"}


@pytest.mark.parametrize(("module", "engine"), [(vllm, "vLLM"), (sglang, "SGLang")])
def test_the_table_has_every_function_with_the_one_op_that_it_calls(module: ModuleType, engine: str) -> None:
    table = rows(engine)
    assert sorted(table) == sorted(module.__all__)
    for name, (op, _) in table.items():
        (found,) = called(getattr(module, name))
        assert found in op, name


@pytest.mark.parametrize("module", [vllm, sglang])
def test_a_function_says_what_differs_and_where_it_comes_from(module: ModuleType) -> None:
    for name in module.__all__:
        text = inspect.getdoc(getattr(module, name)) or ""
        assert "Differs: " in text, name
        assert re.search(r"Source: (vLLM|SGLang), `(vllm|python/sglang)/[\w/]+\.py`", text), name
