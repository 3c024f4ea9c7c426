"""`polyfuse new-backend`: a package for a backend of one's own, with a stub per op, from `templates/backend`."""

import re
import shlex
from pathlib import Path
from textwrap import wrap
from typing import Any

import click

import polyfuse
from polyfuse.cli._options import family_option
from polyfuse.spec import OPS, OpSpec, docstring, fail, literal, parameters_source

TEMPLATES = Path(__file__).parents[1] / "templates/backend"
ARRAYS = {"torch": "torch.Tensor", "jax": "jax.Array", "numpy": "numpy.ndarray"}
WIDTH = 120  # before a docstring's indentation; no line of a formula is longer


@click.command()
@click.argument("name")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Folder to write. Default: polyfuse-NAME.")
@family_option
def command(name: str, folder: Path | None, family: str) -> None:
    """Write a package for a backend NAME of your own, with a stub for every op.

    \b
    Example:
      polyfuse new-backend mychip --dir polyfuse-mychip
    """
    folder = folder or Path(f"polyfuse-{name}")
    for path in new_backend(name, folder, family):
        click.echo(f"created {path}")
    click.echo("next:")
    click.echo(f"  cd {shlex.quote(str(folder))} && python -m pip install --editable '.[test]'")
    click.echo(f"  polyfuse conformance --backend {name} --level quick")
    click.echo("  python -m pytest")


def new_backend(name: str, folder: Path, family: str = "torch") -> list[Path]:
    """Write the package `polyfuse-NAME` into a folder and return its files.

    `name` is a lowercase identifier that no backend has; `folder` is new or empty; `family` is the kind of the
    backend's arrays: torch, jax or numpy. Raises `SpecError`, and then has written nothing.
    """
    from polyfuse.dispatch import registry

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        fail("new-backend", "NAME", "a lowercase identifier", repr(name), "mychip")
    if name in registry().names():
        fail("new-backend", "NAME", f"none of the known backends {', '.join(registry().names())}", repr(name))
    if family not in ARRAYS:
        fail("new-backend", "--family", f"one of {', '.join(ARRAYS)}", repr(family))
    if folder.exists() and not folder.is_dir():
        fail("new-backend", "DIR", "a new or empty folder", f"the file {folder}")
    if folder.exists() and any(folder.iterdir()):
        fail("new-backend", "DIR", "a new or empty folder", f"{folder}, which holds {min(folder.iterdir()).name}")
    files = {folder / path: text for path, text in render(name, family).items()}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(files)


def render(name: str, family: str) -> dict[str, str]:
    """The files of the package: paths in it to their text. A template with OP in its path makes a file per op."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    ops = [_describe(spec, ARRAYS[family]) for spec in OPS.values()]
    facts = {
        "name": name,
        "family": family,
        "extra": "" if family == "numpy" else f"[{family}]",
        "polyfuse_version": polyfuse.__version__,
        "ops": ops,
    }
    files = {}
    for template in environment.list_templates():
        path = template.removesuffix(".j2").replace("NAME", name)
        for op in ops if "OP" in path else [None]:
            target = path.replace("OP", op["name"]) if op else path
            files[target] = environment.get_template(template).render(facts, op=op)
    return files


def _describe(spec: OpSpec, array: str) -> dict[str, Any]:
    """What the stub of an op says about it."""
    lines = [line for line in docstring(spec).splitlines() if not line.startswith("    backend: ")]
    dtypes = {t.name: literal(t.dtypes) for t in spec.tensors if not t.host_unless}
    dtypes |= {a.name: literal(a.values) for a in spec.attrs if a.kind == "dtype"}
    choices = {a.name: literal((*a.values, None) if a.optional else a.values) for a in spec.attrs if a.kind == "enum"}
    choices |= {a.name: literal((False, True)) for a in spec.attrs if a.kind == "bool"}
    return {
        "name": spec.name,
        "version": spec.version,
        "doc": "\n".join(_wrapped(line) for line in lines),
        "parameters": parameters_source(spec, array),
        "result": _result(spec, array),
        "takes_host": any(t.host_unless for t in spec.tensors),
        "dtypes": dtypes,
        "choices": choices,
    }


def _result(spec: OpSpec, array: str) -> str:
    """The type of what a backend's function returns."""
    if spec.updated and not array.startswith("torch"):
        return f"tuple[{array}, ...]"
    return array if len(spec.outputs) == 1 else f"tuple[{', '.join([array] * len(spec.outputs))}]"


def _wrapped(line: str) -> str:
    """A long line of prose as several, the others further in; a line of a formula stays."""
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return "\n".join(wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False)) if len(line) > WIDTH else line
