"""Seeded NumPy inputs from a `Case`: the same case and seed give the same bits everywhere."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any
from zlib import crc32

import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import fill_named
from polyfuse.conformance.layouts import LAYOUTS
from polyfuse.conformance.ops import suite
from polyfuse.dispatch import from_numpy
from polyfuse.reference._numerics import Array, round_to
from polyfuse.spec import OpSpec, TensorSpec, bind
from polyfuse.spec._validate import evaluate

# Of an array's declaration and the names of dimensions: the array.
Make = Callable[[TensorSpec, Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Described:
    """An array without values, for what looks at shapes and dtypes alone."""

    shape: tuple[int, ...]
    dtype: str


def make_inputs(spec: OpSpec, case: Case, seed: int = 0, most: int | None = None) -> dict[str, Any]:
    """Every parameter of the op for this case: NumPy arrays, host values and attributes.

    With `most`, a matrix of more numbers repeats rows, of about as many numbers: for what measures times alone.
    """
    return _inputs(spec, case, lambda tensor, names: _array(spec, tensor, case, names, seed, most))


def described(spec: OpSpec, case: Case) -> dict[str, Any]:
    """The same without the arrays' values."""
    return _inputs(spec, case, lambda tensor, names: Described(_shape(tensor, case, names), _dtype(tensor, case)))


def _inputs(spec: OpSpec, case: Case, make: Make) -> dict[str, Any]:
    values: dict[str, Any] = {a.name: case.attrs.get(a.name, a.default) for a in spec.attrs}
    given = {t.name: t.name in case.present for t in spec.tensors if t.optional}
    names = {**values, **given, **case.dims}
    derived = []
    for tensor in spec.tensors:
        if tensor.optional and not (given[tensor.name] and _is_known(tensor, names)):
            values[tensor.name] = None
            derived += [tensor] if given[tensor.name] else []
        elif tensor.name in case.host:
            values[tensor.name] = _host(tensor, case)
        else:
            values[tensor.name] = make(tensor, names)
    if derived:
        names = {**names, **bind(spec, values).dims, **case.dims}
        values |= {tensor.name: make(tensor, names) for tensor in derived}
    return values


def place(values: Mapping[str, Any], family: str, device: str, stacked: Sequence[str] = ()) -> dict[str, Any]:
    """The same parameters with fresh arrays of a family on a device; torch's that are `stacked` are in one buffer."""
    placed = dict(values)
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            placed[name] = _placed(value, family, device)
    if stacked and family == "torch":
        import torch

        parts = [placed[name] for name in stacked]
        placed |= dict(zip(stacked, torch.cat(parts).split([len(part) for part in parts]), strict=True))
    return placed


def _placed(value: Array, family: str, device: str) -> Any:
    """A fresh array of a family; NumPy's and torch's lie in a copy of the whole memory that `value` is a part of."""
    if not value.size:  # strides of NumPy's are 0
        return from_numpy(np.zeros(0, value.dtype), family, device).reshape(value.shape)
    if family == "jax":
        return from_numpy(value.copy(), family, device)
    owner = value
    while isinstance(owner.base, np.ndarray) and owner.base.dtype == value.dtype:
        owner = owner.base
    memory = owner.ravel(order="K").copy()
    first = (value.ctypes.data - owner.ctypes.data) // value.itemsize
    if family == "numpy":
        return np.lib.stride_tricks.as_strided(memory[first:], value.shape, value.strides)
    strides = [stride // value.itemsize for stride in value.strides]
    return from_numpy(memory, family, device).as_strided(value.shape, strides, first)


def _is_known(tensor: TensorSpec, names: Mapping[str, Any]) -> bool:
    """Whether the case gives all that the array's dimensions need; else they follow from the rest of the call."""
    return _words(tensor.shape) <= names.keys()


@cache
def _words(shape: tuple[str, ...]) -> set[str]:
    """The names in the dimensions of an array."""
    words = {word for symbol in shape for word in re.findall(r"[A-Za-z_]\w*|\.\.\.", symbol)}
    return words - {"if", "else"}


def _host(tensor: TensorSpec, case: Case) -> Any:
    if tensor.name in case.as_tensor:
        return np.array(case.host[tensor.name], dtype=case.dtypes.get(tensor.name, tensor.dtypes[-1]))
    return case.host[tensor.name]


def _shape(tensor: TensorSpec, case: Case, names: Mapping[str, Any]) -> tuple[int, ...]:
    shape: list[int] = []
    for symbol in tensor.shape:
        shape += names.get("...", ()) if symbol == "..." else [evaluate(symbol, names)]
    if tensor.name in case.split:
        first = names[tensor.split]
        shape[-1:] = [first, shape[-1] // first]
    return tuple(shape)


def _dtype(tensor: TensorSpec, case: Case) -> str:
    return case.dtypes.get(tensor.name) or case.dtypes.get(tensor.dtype_var) or tensor.dtypes[0]


def _array(
    spec: OpSpec, tensor: TensorSpec, case: Case, names: Mapping[str, Any], seed: int, most: int | None
) -> Array:
    shape, dtype = _shape(tensor, case, names), _dtype(tensor, case)
    whole = tensor.merged(shape, len(names.get("...", ())))
    rng = np.random.default_rng([seed, crc32(case.name.encode()), crc32(tensor.name.encode())])
    fill = fill_named(case.fill.get(tensor.name, "normal"), suite(spec.name).FILLS)
    made = whole
    if most and len(whole) > 1 and prod(whole) > most:
        made = max(1, most // whole[-1]), whole[-1]
    values = round_to(fill(rng, made, dtype), dtype)
    values = values.reshape(shape) if made == whole else np.resize(values, shape)
    return LAYOUTS[case.layout.get(tensor.name, "contiguous")](values)
