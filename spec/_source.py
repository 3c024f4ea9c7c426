"""An op's functions as source text: the parameters of its backends' functions, and the module of public functions."""

from collections.abc import Iterable

from polyfuse.spec._types import REQUIRED, AttrSpec, OpSpec, TensorSpec

WIDTH = 120
TYPES = {"int": "int", "float": "float", "bool": "bool", "enum": "str", "dtype": "str"}

_HEAD = '''"""The public functions, one per op. `make generate` writes this file from the specs: change them, not it.

Each function's documentation is its spec. This module is imported at the first use of an op.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

from polyfuse.dispatch import named, public, run

if TYPE_CHECKING:
    import jax
    import numpy
    import torch

    Array = TypeVar("Array", torch.Tensor, jax.Array, numpy.ndarray[Any, Any])
    HostArray = numpy.ndarray[Any, Any]
    DType = str | torch.dtype | numpy.dtype[Any] | type[Any]
else:
    Array = TypeVar("Array")
    HostArray = DType = Any
'''
_STUB_HEAD = '''"""The types of what `import polyfuse` offers. `make generate` writes this file from the specs."""

'''


def parameters_source(spec: OpSpec, array: str) -> list[str]:
    """The parameters of a backend's function for the op, one text each, with `*` before those given by keyword.

    `array` is the type of an array, such as `torch.Tensor`.
    """
    kinds = {t.name: f"Sequence[Sequence[int]] | {array}" if t.host_unless else array for t in spec.tensors}
    kinds |= {a.name: TYPES[a.kind] for a in spec.attrs}
    return _parameters(spec, kinds)


def result_name(spec: OpSpec) -> str:
    """The name of the tuple of the op's results."""
    return "".join(word.capitalize() for word in spec.name.split("_")) + "Result"


def result_names(specs: Iterable[OpSpec]) -> list[str]:
    """The tuples of all ops that have several results."""
    return [result_name(spec) for spec in specs if len(spec.outputs) > 1]


def public_module(specs: Iterable[OpSpec]) -> str:
    """The text of `polyfuse/_ops.py`."""
    specs = list(specs)
    exported = sorted([*(spec.name for spec in specs), *result_names(specs)])
    listed = "\n".join(f'    "{name}",' for name in exported)
    parts = [_HEAD, f"__all__ = [\n{listed}\n]\n"]
    for spec in specs:
        if len(spec.outputs) > 1:
            fields = "\n".join(f"    {output.name}: Array" for output in spec.outputs)
            doc = f'    """The results of `{spec.name}`."""'
            parts.append(f"\nclass {result_name(spec)}(NamedTuple, Generic[Array]):\n{doc}\n\n{fields}\n")
        parts.append(_function(spec))
    return "\n".join(parts)


def package_stub(specs: Iterable[OpSpec], former: dict[str, str]) -> str:
    """The text of `polyfuse/__init__.pyi`; `former` maps former names of ops to those that they have now."""
    specs = list(specs)
    names = {
        "polyfuse._ops": [*(spec.name for spec in specs), *result_names(specs)],
        "polyfuse.bench.warmup": ["warmup"],
        "polyfuse.conformance.shadow": ["shadow_report"],
        "polyfuse.dispatch": ["call_counts", "explain", "refresh", "use_backend"],
        "polyfuse.spec": ["BackendError", "SpecError", "Unsupported"],
    }
    lines = [f"from {module} import {name} as {name}" for module, own in names.items() for name in sorted(own)]
    lines += ["", "__version__: str", *(f"{old} = {new}" for old, new in former.items())]
    return _STUB_HEAD + "\n".join(lines) + "\n"


def _function(spec: OpSpec) -> str:
    """The public function of an op."""
    kinds = {t.name: _public_type(t) for t in spec.tensors} | {a.name: _public_type(a) for a in spec.attrs}
    lines = [*_parameters(spec, kinds), "backend: str | Sequence[str] | None = None"]
    signature = "\n".join(f"    {line}," for line in lines)
    several = len(spec.outputs) > 1
    result = f"{result_name(spec)}[Array]" if several else "Array"
    call = f'run("{spec.name}", {_tuple(list(spec.parameters))}, backend)'
    body = f"named({result_name(spec)}, {call})" if several else call
    head = f"\n@public\ndef {spec.name}(\n{signature}\n) -> {result}:\n"
    return f'{head}    """{spec.summary}"""\n    return {body}\n'


def _parameters(spec: OpSpec, kinds: dict[str, str]) -> list[str]:
    lines: list[str] = []
    nullable = {t.name for t in spec.tensors if t.optional} | {a.name for a in spec.attrs if a.optional}
    for name, default in spec.parameters.items():
        if name not in spec.positional and "*" not in lines:
            lines.append("*")
        optional = " | None" if name in nullable else ""
        given = "" if default is REQUIRED else f" = {literal(default)}"
        lines.append(f"{name}: {kinds[name]}{optional}{given}")
    return lines


def _public_type(field: TensorSpec | AttrSpec) -> str:
    if isinstance(field, TensorSpec):
        return "Sequence[Sequence[int]] | Array | HostArray" if field.host_unless else "Array"
    if field.kind == "enum":
        return f"Literal[{', '.join(map(literal, field.values))}]"
    return "DType" if field.kind == "dtype" else TYPES[field.kind]


def _tuple(names: list[str]) -> str:
    return f"({', '.join(names)}{',' if len(names) == 1 else ''})"


def literal(value: object) -> str:
    """A value as source text, with double quotes; no string of a spec contains a quote."""
    return repr(value).replace("'", '"')
