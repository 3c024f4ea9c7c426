"""An op's documentation from its spec: the docstring of its public function, and its page in Markdown."""

import textwrap
from collections.abc import Iterable

from polyfuse.spec._source import literal
from polyfuse.spec._types import REQUIRED, AttrSpec, OpSpec, TensorSpec

_UPDATED = "Written in place where they are torch tensors, returned behind the results as JAX or NumPy arrays"


def docstring(spec: OpSpec) -> str:
    """An op's documentation, from its spec."""
    lines = [spec.summary, "", _definition(spec), "", "Arguments:"]
    for t in spec.tensors:
        optional = ", optional" if t.optional else ""
        shapes = " or ".join(f"[{', '.join(shape)}]" for shape in t.shapes)
        updated = ", updated in place" if t.updated else ""
        lines.append(f"    {t.name}: {shapes} {_variable(t)}{'/'.join(t.dtypes)}{optional}{updated}. {t.doc}.")
    for a in spec.attrs:
        kind = " | ".join(_values(a)) if a.kind == "enum" else a.kind
        default = "required" if a.default is REQUIRED else f"default {a.default!r}"
        lines.append(f"    {a.name}: {kind}, {default}. {a.doc}.")
    lines.append("    backend: a backend name, or a list in order of preference; None selects one for the machine.")
    lines += ["", "Returns:"]
    lines += [f"    {o.name}: [{', '.join(o.shape)}] {o.dtype}. {o.doc}." for o in spec.outputs]
    if spec.updated:
        lines += [f"    {_UPDATED}: {', '.join(spec.updated)}."]
    lines += ["", "Notes:"] + [f"    {e}" for e in spec.edge_cases]
    lines += ["", "Raises:", "    SpecError: an argument breaks a rule above; nothing was launched."]
    lines += ["    Unsupported, BackendError: no preferred backend can run the call.", "", f"Source: {spec.source}."]
    return "\n".join(lines)


def op_page(spec: OpSpec) -> str:
    """The whole definition of an op as Markdown."""
    inputs = [
        (
            f"`{t.name}`{_remark(t)}",
            " or ".join(map(_shape, t.shapes)),
            _variable(t) + ", ".join(t.dtypes),
            t.doc,
        )
        for t in spec.tensors
    ]
    attrs = [
        (
            f"`{a.name}`",
            "required" if a.default is REQUIRED else f"`{a.default!r}`",
            ", ".join(_values(a)) or a.kind,
            a.doc,
        )
        for a in spec.attrs
    ]
    outputs = [(f"`{o.name}`", _shape(o.shape), o.dtype, o.doc) for o in spec.outputs]
    parts = [
        f"# `{spec.name}`",
        spec.summary,
        f"Spec version {spec.version}. Source: {spec.source}.",
        f"![{spec.name}: what it reads, its steps, and what it writes]({spec.name}.svg)",
        "## Call",
        f"```text\n{_signature(spec)}\n```",
        *_example(spec),
        "## Definition",
        f"```text\n{_definition(spec)}\n```",
        "## Arguments",
        _table(("array", "shape", "dtype", "meaning"), inputs),
        _table(("keyword", "default", "values", "meaning"), attrs),
        "## Results",
        _table(("result", "shape", "dtype", "meaning"), outputs),
        *([f"{_UPDATED}: {', '.join(f'`{name}`' for name in spec.updated)}."] if spec.updated else []),
        "## Edge cases",
        "\n".join(f"- {e}" for e in spec.edge_cases),
        "## Error bound",
        "An element is right if it lies between the rounded ends of an interval around the exact value; its half-width "
        "is a number of float32 roundings (2^-24) of the magnitude named here.",
        "\n".join(f"- `{e.value}`: {e.reason}." for e in spec.errors),
    ]
    return "\n\n".join(parts) + "\n"


def _definition(spec: OpSpec) -> str:
    """The formula without its first line, which says what the summary says."""
    return spec.formula.strip().partition("\n")[2].strip("\n")


def _signature(spec: OpSpec) -> str:
    """How the op is called, and what it returns."""
    keywords = [name for name in spec.parameters if name not in spec.positional]
    given = {name: "" if value is REQUIRED else f"={literal(value)}" for name, value in spec.parameters.items()}
    names = [*spec.positional, "*", *keywords]
    call = ", ".join([*(name + given.get(name, "") for name in names), "backend=None"])
    text = f"polyfuse.{spec.name}({call}) -> {', '.join(output.name for output in spec.outputs)}"
    return textwrap.fill(text, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _example(spec: OpSpec) -> tuple[str, ...]:
    """A call, and what it prints."""
    if spec.example is None:
        return ()
    code, printed = spec.example
    imports = "import torch\nimport polyfuse"
    return f"```python\n{imports}\n\n{code.strip()}\n```", f"```text\n{printed}\n```"


def _variable(tensor: TensorSpec) -> str:
    """The dtype's name, by which other arguments and results have the same one."""
    return f"{tensor.dtype_var}: " if tensor.dtype_var else ""


def _values(attr: AttrSpec) -> tuple[str, ...]:
    return (*attr.values, "None") if attr.nullable else attr.values


def _remark(tensor: TensorSpec) -> str:
    remarks = [word for word, holds in (("optional", tensor.optional), ("updated", tensor.updated)) if holds]
    return f" ({', '.join(remarks)})" if remarks else ""


def _shape(shape: tuple[str, ...]) -> str:
    return f"`[{', '.join(shape)}]`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
