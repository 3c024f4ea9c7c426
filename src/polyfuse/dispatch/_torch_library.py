"""`torch.ops.polyfuse.*`: each op as one opaque node of a compiled graph, registered from its spec.

Choices among named values (enums, dtypes) travel as their index, -1 for None: no string enters a graph.
A host argument travels as a flat list of integers. The schema says which arguments an op updates in place.
"""

from typing import Any

import torch

from polyfuse.dispatch._arrays import family_of
from polyfuse.dispatch._call import run
from polyfuse.dispatch._plan import CALLS, Calls
from polyfuse.spec import AttrSpec, OpSpec, SpecError, TensorSpec, Unsupported, bind

_LIBRARY = torch.library.Library("polyfuse", "FRAGMENT")
_SCHEMA_TYPES = {"int": "SymInt", "float": "float", "bool": "bool", "enum": "int", "dtype": "int"}


def _fields(spec: OpSpec) -> dict[str, TensorSpec | AttrSpec]:
    return {**{t.name: t for t in spec.tensors}, **{a.name: a for a in spec.attrs}}


def schema(op: Calls) -> str:
    """The op's schema in torch's notation."""
    parameters = []
    fields = _fields(op.spec)
    for name in op.names:
        field = fields[name]
        if isinstance(field, TensorSpec):
            optional = "?" if field.optional or field.host_unless else ""
            written = f"({name}!)" if field.updated else ""
            parameters.append(f"Tensor{written}{optional} {name}")
            if field.host_unless:
                parameters.append(f"SymInt[]? {name}_values")
        else:
            named = field.kind in ("enum", "dtype")
            parameters.append(f"{_SCHEMA_TYPES[field.kind]}{'?' if field.optional and not named else ''} {name}")
    returns = ", ".join(["Tensor"] * len(op.spec.outputs))
    return f"{op.spec.name}({', '.join(parameters)}) -> {returns if len(op.spec.outputs) == 1 else f'({returns})'}"


def flatten(op: Calls, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A public function's arguments as the registered op takes them."""
    flat: list[Any] = []
    fields = _fields(op.spec)
    for name, value in zip(op.names, args, strict=True):
        field = fields[name]
        if isinstance(field, TensorSpec):
            if not field.host_unless:
                flat.append(value)
            elif isinstance(value, torch.Tensor):
                flat.extend((value, None))
            else:
                flat.extend((None, [v for row in value for v in row]))
        elif field.kind in ("enum", "dtype"):
            named = str(value).removeprefix("torch.")
            if value is not None and named not in field.values:
                raise SpecError(f"{op.spec.name}: {name}: expected one of {', '.join(field.values)}, got {value!r}")
            flat.append(-1 if value is None else field.values.index(named))
        else:
            flat.append(value)
    return tuple(flat)


def traced(op: Calls, args: tuple[Any, ...]) -> Any:
    """Call the registered op with a public function's arguments."""
    return getattr(torch.ops.polyfuse, op.spec.name)(*flatten(op, args))


def _decode(op: Calls, flat: tuple[Any, ...]) -> tuple[Any, ...]:
    values = iter(flat)
    args: list[Any] = []
    fields = _fields(op.spec)
    for name in op.names:
        field, value = fields[name], next(values)
        if isinstance(field, TensorSpec):
            if field.host_unless:
                rows, width = next(values), int(field.shape[1])
                if rows is not None:
                    value = tuple(tuple(rows[i : i + width]) for i in range(0, len(rows), width))
        elif field.kind in ("enum", "dtype"):
            value = None if value < 0 else field.values[value]
        args.append(value)
    return tuple(args)


def _owned(spec: OpSpec, results: Any) -> Any:
    """Results as a graph needs them: none a view of another's memory, and each with the strides that its spec gives."""
    if not isinstance(results, tuple):
        return results
    storages = [r.untyped_storage() for r in results]
    # All storages without bytes are at address 0, and yet they are not one.
    if len({s.data_ptr() or s._cdata for s in storages}) == len(results):
        return results
    owned = []
    for result, output in zip(results, spec.outputs, strict=True):
        if output.strides:
            copy = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=result.device)
            owned.append(copy.copy_(result))
        else:
            owned.append(result.clone(memory_format=torch.contiguous_format))
    return tuple(owned)


def register(op: Calls) -> None:
    """Define the op in torch's library with an implementation and a fake kernel."""
    spec = op.spec
    _LIBRARY.define(schema(op))

    def eager(*flat: Any) -> Any:
        return _owned(spec, run(spec.name, _decode(op, flat), None))

    def fake(*flat: Any) -> Any:
        call = bind(spec, dict(zip(op.names, _decode(op, flat), strict=True)), read_host=False)
        device = next(x.device for x in flat if family_of(x) == "torch")
        results = []
        for out in call.outputs:
            sizes = [torch.library.get_ctx().new_dynamic_size() if n is None else n for n in out.shape]
            dtype = getattr(torch, out.dtype)
            if out.strides:
                results.append(torch.empty_strided(sizes, out.strides, dtype=dtype, device=device))
            else:
                results.append(torch.empty(sizes, dtype=dtype, device=device))
        return results[0] if len(results) == 1 else tuple(results)

    def backward(*_: Any) -> Any:
        raise Unsupported(
            f"{spec.name}: a gradient through the registered op: it has no backward; try torch.no_grad(), or the call "
            "outside torch.compile, where a backend that has one is chosen"
        )

    def refusing(*flat: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in flat):
            given = dict(zip(op.names, _decode(op, flat), strict=True))
            if all(given[name] is None for name in spec.updated):
                backward()
            raise Unsupported(
                f"{spec.name}: an input requires grad: {', '.join(spec.updated)} is updated in place: no backward; try "
                "torch.no_grad(), or detach"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.polyfuse, spec.name)(*flat)

    _LIBRARY.impl(spec.name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"polyfuse::{spec.name}", fake, lib=_LIBRARY)
    if spec.updated:  # for which autograd formulas cannot be registered
        _LIBRARY.impl(spec.name, refusing, "Autograd")
    else:
        torch.library.register_autograd(f"polyfuse::{spec.name}", backward, lib=_LIBRARY)


for _op in CALLS.values():
    register(_op)
