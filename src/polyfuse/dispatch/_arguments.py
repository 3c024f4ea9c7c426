"""A call's arguments before it is planned: host arguments read, arrays checked to be of one framework and device."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from polyfuse.dispatch._arrays import FAMILIES, Device, device_of, family_of, is_traced
from polyfuse.spec import Call, OpSpec, SpecError, bind, dtype_name, fail

_ROW, _INTEGER = frozenset([tuple]), frozenset([int])


def examine_arguments(spec: OpSpec, names: Sequence[str], args: tuple[Any, ...]) -> tuple[Call, str, Device, bool]:
    """Validate a call: (call, array family, device, whether a gradient is wanted). Raises `SpecError`."""
    values = dict(zip(names, args, strict=True))
    family = device = first = None
    needs_grad = False
    for tensor in spec.tensors:
        value = values[tensor.name]
        kind = family_of(value)
        if kind is None:
            if value is not None and not tensor.host_unless:
                kinds = ", ".join(FAMILIES)
                raise SpecError(f"{spec.name}: {tensor.name}: expected an array of {kinds}, got {type(value).__name__}")
            continue
        _check_kind(spec, tensor.name, value, kind)
        if tensor.updated and kind == "torch":
            _check_memory(spec, tensor.name, value)
        here = device_of(value, kind)
        place = value.device if kind == "torch" else here
        if first is None:
            family, device, first = kind, here, (tensor.name, place)
        elif kind != family or place != first[1]:
            raise SpecError(
                f"{spec.name}: {tensor.name}: expected a {family} array on {_place_text(first[1])} "
                f"as {first[0]}, got {kind} on {_place_text(place)}"
            )
        if kind == "torch" and value.requires_grad:
            import torch

            needs_grad = needs_grad or torch.is_grad_enabled()
    call = bind(spec, values)
    if family is None or device is None:
        raise SpecError(f"{spec.name}: expected at least one array")
    return call, family, device, needs_grad


def _check_kind(spec: OpSpec, name: str, value: Any, family: str) -> None:
    """Raise `SpecError` for an array that holds its elements in another way than densely."""
    if family == "torch":
        import torch

        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            kind = "quantised" if value.is_quantized else "nested" if value.is_nested else str(value.layout)
            fail(spec.name, name, "a dense tensor", f"a tensor that is {kind}", "its dense form")
    elif family == "numpy" and isinstance(value, (np.ma.MaskedArray, np.matrix)):
        fail(spec.name, name, "a plain array", f"a {type(value).__name__}", "numpy.asarray or .filled()")


def _check_memory(spec: OpSpec, name: str, value: Any) -> None:
    """Raise `SpecError` for a tensor that would be written where two of its elements share memory."""
    extent = 1
    for stride, size in sorted((step, n) for step, n in zip(value.stride(), value.shape, strict=True) if n > 1):
        if stride < extent:
            fail(spec.name, name, "a tensor whose elements have memory of their own", f"strides {list(value.stride())}")
        extent = stride * size


def _place_text(place: Any) -> str:
    return place.kind if isinstance(place, Device) else str(place)


def read_hosts(
    spec: OpSpec, names: Sequence[str], hosts: Sequence[tuple[int, int]], args: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Host arguments as hashable tuples; a tensor is read back here unless it must stay on its device.

    `hosts` are the places of each host argument and of the attribute that keeps it on the device.
    """
    values = list(args)
    for index, unless in hosts:
        value = args[index]
        if not isinstance(value, (list, tuple)):
            value = _read_array(spec, names, args, index, unless)
        if isinstance(value, (list, tuple)):
            values[index] = _rows(value)
    return tuple(values)


def _read_array(spec: OpSpec, names: Sequence[str], args: tuple[Any, ...], index: int, unless: int) -> Any:
    """A host argument given as an array as lists, or as it is where it stays or the validator refuses it."""
    value, name = args[index], names[index]
    family = family_of(value)
    if family is None or (family == family_of(args[0]) and args[unless] is not None):
        return value
    if is_traced(value):
        raise SpecError(f"{spec.name}: {name}: a traced array needs {names[unless]}=, got None")
    dtypes = next(t.dtypes for t in spec.tensors if t.name == name)
    if dtype_name(value.dtype) not in dtypes or value.ndim != 2:
        return value
    try:
        return value.tolist()
    except (NotImplementedError, RuntimeError):  # an array without values, such as one on the meta device
        return value


def _rows(value: Sequence[Any]) -> Any:
    """Rows of ints as tuples; what holds anything else as a list, which no cache key matches, for the validator."""
    rows = tuple([tuple(row) if isinstance(row, (list, tuple)) else row for row in value])
    if {*map(type, rows)} <= _ROW and {*map(type, chain.from_iterable(rows))} <= _INTEGER:
        return rows
    integers = []
    for row in rows:
        if type(row) is tuple:
            row = tuple(int(v) if isinstance(v, np.integer) else v for v in row)
        integers.append(row)
    return integers
