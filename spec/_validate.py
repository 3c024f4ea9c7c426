"""One validator for every op: from an `OpSpec` and actual arguments to a `Call`, or a `SpecError`.

Arrays are looked at through `.shape` and `.dtype` only, so it serves NumPy, torch (fake tensors too)
and JAX (tracers too) alike.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import replace
from functools import cache
from math import isqrt
from numbers import Real
from operator import index
from types import CodeType
from typing import Any, NoReturn

from polyfuse.spec._errors import SpecError
from polyfuse.spec._types import REQUIRED, AttrSpec, Call, OpSpec, Output, Required, TensorSpec

_NAME = re.compile(r"[A-Za-z_]\w*")
LONGEST_VALUE = 200  # characters
_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2}


def fail(op: str, argument: str, expected: str, got: object, hint: str = "") -> NoReturn:
    """Raise the one kind of message: `op: argument: expected X, got Y; try Z`, in one line."""
    raise SpecError(f"{op}: {argument}: expected {expected}, got {one_line(got)}" + (f"; try {hint}" if hint else ""))


def one_line(text: object) -> str:
    """A text without line breaks, shortened to what a message can hold."""
    line = " ".join(str(text).split())
    return line if len(line) <= LONGEST_VALUE else f"{line[:LONGEST_VALUE]}..."


def shown(value: object) -> str:
    """A received value for a message: an array by its kind, shape and dtype, anything else by its `repr`."""
    if _is_array(value):
        array: Any = value
        kind = f"{type(array).__module__.partition('.')[0]} array"
        try:
            shape = f"of shape {list(array.shape)}"
        except RuntimeError:  # a nested tensor has none
            shape = "without a shape"
        return f"a {kind} {shape} and dtype {dtype_name(array.dtype)}"
    return one_line(repr(value))


def dtype_name(dtype: Any) -> str:
    """The NumPy name of a dtype given as a string or as any framework's dtype object."""
    if isinstance(dtype, str):
        return dtype
    if isinstance(dtype, type):
        return dtype.__name__
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def itemsize(dtype: str) -> int:
    """Bytes per element."""
    return _BYTES.get(dtype, 1)


def bind(spec: OpSpec, arguments: Mapping[str, Any], *, read_host: bool = True) -> Call:
    """Check a call and bind every name in it.

    `arguments` maps every parameter of the op to its value (defaults included). Returns the `Call` with
    canonical attributes (dtypes by name), host arguments as tuples, and its outputs. With
    `read_host=False` (tracing) a host argument given as a tensor is not read, and a size that depends
    on it is `None`. Raises `SpecError`.
    """
    attrs = {a.name: _attr(spec, a, arguments[a.name]) for a in spec.attrs}
    host: dict[str, Any] = {}
    shapes: dict[str, tuple[Any, ...]] = {}
    dtypes: dict[str, str] = {}
    for tensor in spec.tensors:
        value = arguments[tensor.name]
        if value is None:
            if not tensor.optional:
                fail(spec.name, tensor.name, "an array", None)
            continue
        if tensor.host_unless:
            value = _to_host(spec, tensor, value, read_host and attrs[tensor.host_unless] is None)
        if isinstance(value, tuple):
            host[tensor.name] = value
            shapes[tensor.name] = (len(value), len(value[0]))
            continue
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            fail(spec.name, tensor.name, "an array", type(value).__name__)
        shapes[tensor.name] = tuple(value.shape)
        dtypes[tensor.name] = _dtype(spec, tensor, dtype_name(value.dtype), dtypes)
    given = {t.name: arguments[t.name] is not None for t in spec.tensors if t.optional}
    dims = _bind_shapes(spec, shapes, attrs, given)
    call = Call(spec, dims, attrs, dtypes, host)
    spec.check(call)
    extra = spec.derive(call)
    call = replace(
        call,
        dims={**dims, **{k: v for k, v in extra.items() if not isinstance(v, str)}},
        dtypes={**dtypes, **{k: v for k, v in extra.items() if isinstance(v, str)}},
    )
    _check_derived(call, shapes)
    names = {**attrs, **call.dims}
    outputs = tuple(
        Output(o.name, _evaluate_shape(o.shape, names), call.dtypes.get(o.dtype, o.dtype), names.get(o.strides))
        for o in spec.outputs
    )
    updated = tuple(
        Output(t.name, shapes[t.name], dtypes[t.name]) for t in spec.tensors if t.updated and t.name in shapes
    )
    return replace(call, outputs=outputs, updated=updated)


def _attr(spec: OpSpec, attr: AttrSpec, value: Any) -> Any:
    """The canonical value of an attribute: a dtype by its name, a number or a flag as Python's own."""
    # torch.compile of PyTorch 2.11 cannot ask whether a number that it traces is a certain object.
    if value is None or isinstance(value, Required):
        if attr.optional:
            return None
        fail(
            spec.name, attr.name, "a value" if attr.default is REQUIRED else f"a value (default {attr.default!r})", None
        )
    if attr.kind in ("enum", "dtype"):
        return _choice(spec, attr, value)
    if attr.kind == "bool":
        if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
            fail(spec.name, attr.name, "True or False", shown(value))
        return bool(value)
    if attr.kind == "int":
        number = _integer(value)
        if number is None:
            fail(spec.name, attr.name, "an integer", shown(value))
        if attr.minimum is not None and number < attr.minimum:
            fail(spec.name, attr.name, f"an integer >= {attr.minimum}", number)
        return number
    if isinstance(value, bool) or not isinstance(value, Real):
        fail(spec.name, attr.name, "a number", shown(value))
    real = float(value)
    if attr.minimum is not None and not real >= attr.minimum:
        fail(spec.name, attr.name, f"a number >= {attr.minimum}", value)
    return real


def _choice(spec: OpSpec, attr: AttrSpec, value: Any) -> str:
    """The name of one of an attribute's values."""
    name = None if _is_array(value) else dtype_name(value) if attr.kind == "dtype" else value
    if not isinstance(name, str) or name not in attr.values:
        fail(spec.name, attr.name, f"one of {', '.join(attr.values)}", shown(value))
    return name


def _integer(value: Any) -> Any:
    """An integer, symbolic ones too, or the one integer in an array without dimensions; None for anything else."""
    if type(value) is int:  # also what torch.compile traces as a symbol, which has no attributes
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    if not _is_array(value):
        return value if type(value).__name__ == "SymInt" else index(value)
    if value.ndim or "int" not in dtype_name(value.dtype):
        return None
    try:
        return index(value)
    except (TypeError, RuntimeError):  # an array without a value: traced, or on the meta device
        return None


def _is_array(value: Any) -> bool:
    if isinstance(value, type) or not hasattr(value, "dtype"):
        return False
    try:
        return hasattr(value, "shape") and hasattr(value, "ndim")
    except RuntimeError:  # a nested tensor has no shape
        return True


def _to_host(spec: OpSpec, tensor: TensorSpec, value: Any, read: bool) -> Any:
    """Rows of ints as a tuple of tuples; a tensor is read back unless it must stay on the device."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        if dtype_name(value.dtype) not in tensor.dtypes:
            fail(spec.name, tensor.name, f"dtype {' or '.join(tensor.dtypes)}", dtype_name(value.dtype))
        if len(value.shape) != 2 or value.shape[1] != int(tensor.shape[1]):
            fail(spec.name, tensor.name, f"shape {_shape_text(tensor.shape)}", list(value.shape))
        if not read:
            return value
        try:
            value = value.tolist()
        except (NotImplementedError, RuntimeError):
            fail(spec.name, tensor.name, "an array whose values can be read", shown(value))
    width = int(tensor.shape[1])
    if isinstance(value, (str, bytes, Set, Mapping)):
        fail(spec.name, tensor.name, f"rows of {width} integers", shown(value))
    try:
        given = tuple(tuple(row) for row in value)
    except (TypeError, RuntimeError):
        fail(spec.name, tensor.name, f"rows of {width} integers", shown(value))
    rows = tuple(tuple(_integer(number) for number in row) for row in given)
    for i, row in enumerate(rows):
        if len(row) != width or None in row:
            fail(spec.name, f"{tensor.name}[{i}]", f"{width} integers", list(given[i]))
    if not rows:
        fail(spec.name, tensor.name, "at least one row", "[]")
    return rows


def _dtype(spec: OpSpec, tensor: TensorSpec, dtype: str, bound: dict[str, str]) -> str:
    if dtype not in tensor.dtypes:
        fail(spec.name, tensor.name, f"dtype {' or '.join(tensor.dtypes)}", dtype)
    if tensor.dtype_var:
        first = bound.setdefault(tensor.dtype_var, dtype)
        if first != dtype:
            fail(spec.name, tensor.name, f"dtype {first} as the other {tensor.dtype_var} arguments", dtype)
    return dtype


def _bind_shapes(
    spec: OpSpec, shapes: Mapping[str, tuple[Any, ...]], attrs: Mapping[str, Any], given: Mapping[str, bool]
) -> dict[str, Any]:
    """The dimensions of the arguments, whose shapes must agree; `given` says which of the optional arrays are there."""
    dims: dict[str, Any] = {}
    expressions: list[tuple[TensorSpec, str, Any]] = []
    conditions = {**attrs, **given}
    for declared in spec.tensors:
        if declared.name not in shapes:
            continue
        symbols = tuple(_chosen(symbol, conditions) for symbol in declared.shape)
        tensor = declared if symbols == declared.shape else replace(declared, shape=symbols)
        actual = shapes[tensor.name]
        leading = len(dims.get("...", ()))
        if tensor.is_split(actual, leading) and actual[-2] != attrs[tensor.split]:
            expected = f"{tensor.split}={attrs[tensor.split]} in {_shape_text(tensor.shapes[-1])}"
            fail(spec.name, tensor.name, expected, list(actual))
        shape = tensor.merged(actual, leading)
        if symbols and symbols[0] == "...":
            symbols = symbols[1:]
            lead = len(shape) - len(symbols)
            if lead >= 0:
                if dims.setdefault("...", shape[:lead]) != shape[:lead]:
                    want = f"leading dimensions {list(dims['...'])} in {_shape_text(tensor.shape)}"
                    fail(spec.name, tensor.name, want, list(shape))
                shape = shape[lead:]
        if len(shape) != len(symbols):
            fail(spec.name, tensor.name, f"shape {_shapes_text(tensor)}", list(actual))
        for symbol, size in zip(symbols, shape, strict=True):
            if not _NAME.fullmatch(symbol) or symbol in attrs:
                expressions.append((tensor, symbol, size))
            elif dims.setdefault(symbol, size) != size:
                fail(spec.name, tensor.name, f"{symbol}={dims[symbol]} in {_shapes_text(tensor)}", list(actual))
    names = {**attrs, **dims}
    for tensor, symbol, size in expressions:
        unknown = set(_NAME.findall(symbol)) - names.keys()
        if not unknown:
            if evaluate(symbol, names) != size:
                want = evaluate(symbol, names)
                fail(
                    spec.name, tensor.name, f"{symbol}={want} in {_shape_text(tensor.shape)}", list(shapes[tensor.name])
                )
        else:
            solved = unknown.pop()
            names[solved] = dims[solved] = _solve(spec, tensor, symbol, size, names)
    return dims


def _chosen(symbol: str, names: Mapping[str, Any]) -> str:
    """The side of a choice such as `"D if up else 2*D"` that a call takes; any other dimension as it is."""
    first, choice, rest = symbol.partition(" if ")
    condition, _, second = rest.partition(" else ")
    return symbol if not choice else first if names[condition] else second


def _solve(spec: OpSpec, tensor: TensorSpec, symbol: str, size: Any, names: Mapping[str, Any]) -> Any:
    """The unknown of `k*X` (k known) or `X*X`, given the value of the product."""
    left, _, right = symbol.rpartition("*")
    if left == right:
        root = isqrt(int(size))
        if root * root != size:
            fail(spec.name, tensor.name, f"a square number of rows in {_shape_text(tensor.shape)}", size)
        return root
    factor = evaluate(left, names)
    if size % factor:
        divisor = left if left == str(factor) else f"{left}={factor}"
        fail(spec.name, tensor.name, f"a size divisible by {divisor} in {_shape_text(tensor.shape)}", size)
    return size // factor


def _check_derived(call: Call, shapes: Mapping[str, tuple[Any, ...]]) -> None:
    """Dimensions that `derive` determines must agree with the arguments that use them."""
    for tensor in call.op.tensors:
        shape = tensor.merged(shapes.get(tensor.name, ()), len(call.dims.get("...", ())))
        for symbol, size in zip(reversed(tensor.shape), reversed(shape), strict=False):
            want = call.dims.get(symbol)
            if want is not None and symbol != "..." and size != want:
                fail(
                    call.op.name,
                    tensor.name,
                    f"{symbol}={want} in {_shape_text(tensor.shape)}",
                    list(shapes[tensor.name]),
                )


@cache
def _compile(expression: str) -> CodeType:
    return compile(expression, "<dimension>", "eval")


def evaluate(expression: str, names: Mapping[str, Any]) -> Any:
    """The value of a dimension expression such as `"2*D"`."""
    if expression in names:  # most are one name, and torch.compile traces no evaluation
        return names[expression]
    return eval(_compile(expression), {"__builtins__": {}}, dict(names))


def _evaluate_shape(symbols: tuple[str, ...], names: Mapping[str, Any]) -> tuple[Any, ...]:
    """A result's shape; a name may stand for several dimensions, as `"..."` does."""
    shape: list[Any] = []
    for symbol in symbols:
        size = names["..."] if symbol == "..." else evaluate(symbol, names)
        shape.extend(size if isinstance(size, tuple) else (size,))
    return tuple(shape)


def _shapes_text(tensor: TensorSpec) -> str:
    return " or ".join(map(_shape_text, tensor.shapes))


def _shape_text(symbols: tuple[str, ...]) -> str:
    return "[" + ", ".join(symbols) + "]"
