"""Seeded NumPy inputs from a `Case`: the same case and seed give the same bits everywhere."""

from collections.abc import Callable, Mapping
from typing import Any
from zlib import crc32

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from polyfuse.dispatch import from_numpy
from polyfuse.reference._numerics import numpy_dtype, round_to
from polyfuse.spec import Case, OpSpec, TensorSpec, bind
from polyfuse.spec._validate import evaluate

Array = NDArray[Any]


def make_inputs(spec: OpSpec, case: Case, seed: int = 0) -> dict[str, Any]:
    """Every parameter of the op for this case: NumPy arrays, host values and attributes."""
    values: dict[str, Any] = {a.name: case.attrs.get(a.name, a.default) for a in spec.attrs}
    names = {**values, **case.dims}
    for tensor in spec.tensors:
        if tensor.optional:
            values[tensor.name] = None
        elif tensor.name in case.host:
            values[tensor.name] = _host(tensor, case)
        else:
            values[tensor.name] = _array(tensor, case, names, seed)
    if case.present:
        names = {**values, **bind(spec, values).dims, **case.dims}
        for tensor in spec.tensors:
            if tensor.name in case.present:
                values[tensor.name] = _array(tensor, case, names, seed)
    return values


def place(values: Mapping[str, Any], family: str, device: str) -> dict[str, Any]:
    """The same parameters with fresh arrays of a family on a device."""
    placed = dict(values)
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            placed[name] = value.copy(order="K") if family == "numpy" else from_numpy(value, family, device)
    return placed


def _host(tensor: TensorSpec, case: Case) -> Any:
    if tensor.name in case.as_tensor:
        return np.array(case.host[tensor.name], dtype=case.dtypes.get(tensor.name, tensor.dtypes[-1]))
    return case.host[tensor.name]


def _array(tensor: TensorSpec, case: Case, names: Mapping[str, Any], seed: int) -> Array:
    shape: list[int] = []
    for symbol in tensor.shape:
        shape += names.get("...", ()) if symbol == "..." else [evaluate(symbol, names)]
    dtype = case.dtypes.get(tensor.name) or case.dtypes.get(tensor.dtype_var) or tensor.dtypes[0]
    rng = np.random.default_rng([seed, crc32(case.name.encode()), crc32(tensor.name.encode())])
    fill = FILLS[case.fill.get(tensor.name, "normal")]
    values = round_to(fill(rng, tuple(shape), dtype), dtype)
    return LAYOUTS[case.layout.get(tensor.name, "contiguous")](values)


_Fill = Callable[[np.random.Generator, tuple[int, ...], str], NDArray[np.float64]]


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[np.float64]:
    return rng.standard_normal(shape)


def _sprinkled(special: tuple[float, ...]) -> _Fill:
    def fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[np.float64]:
        values = rng.standard_normal(shape)
        where = rng.random(shape) < 0.02
        values[where] = rng.choice(special, size=int(where.sum()))
        return values

    return fill


def _huge(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[np.float64]:
    """Up to a quarter of the largest finite value: sums of signed weights stay finite in fp32."""
    return rng.uniform(-1, 1, shape) * float(ml_dtypes.finfo(numpy_dtype(dtype)).max) / 4


def _subnormal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[np.float64]:
    return rng.uniform(-1, 1, shape) * float(ml_dtypes.finfo(numpy_dtype(dtype)).tiny)


def _nan_tail(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[np.float64]:
    """NaN in the last fifth of the rows: for padding that must not be read."""
    values = rng.standard_normal(shape)
    values[shape[0] - shape[0] // 5 :] = np.nan
    return values


def _scaled(scale: float) -> _Fill:
    return lambda rng, shape, dtype: rng.standard_normal(shape) * scale


def _decades(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[np.float64]:
    """Magnitudes from 1e-4 to 1e3, so that the groups of a row have very different scales."""
    return rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 3, (*shape[:-1], 1))


def _outliers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[np.float64]:
    values = rng.standard_normal(shape)
    values[rng.random(shape) < 0.01] *= 100
    return values


def _wide_line(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[np.float64]:
    """Evenly spread over [-110, 110]: past where exp underflows and overflows in float32."""
    return np.linspace(-110, 110, int(np.prod(shape))).reshape(shape)


def row_counts(experts: int) -> NDArray[np.int64]:
    """Valid rows per expert: 2, 0, 5, 3, 1, 6, 4, 2, ..."""
    return (5 * np.arange(experts) + 2) % 7


def _nan_past_rows(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[np.float64]:
    """NaN in the rows of each expert past its `row_counts`: they must not be read."""
    values = rng.standard_normal(shape)
    for expert, count in enumerate(row_counts(shape[0])):
        values[expert, count:] = np.nan
    return values


def _cu_seqlens(times: int) -> _Fill:
    """Where sequences of `row_counts` rows, each that many `times`, begin and end."""
    return lambda rng, shape, dtype: times * np.concatenate([[0.0], np.cumsum(row_counts(shape[0] - 1))])


def _zero_tail(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[np.float64]:
    """Zeros in the last 8 rows: what follows finds what a first row finds before it."""
    values = rng.standard_normal(shape)
    values[-8:] = 0
    return values


FILLS: dict[str, _Fill] = {
    "normal": _normal,
    "zeros": lambda rng, shape, dtype: np.zeros(shape),
    "nan_some": _sprinkled((np.nan,)),
    "inf_some": _sprinkled((np.inf, -np.inf)),
    "huge": _huge,
    "subnormal": _subnormal,
    "nan_tail": _nan_tail,
    "large": _scaled(200.0),
    "tiny": _scaled(1e-6),
    "tiny_vectors": _scaled(1e-5),
    "decades": _decades,
    "outliers": _outliers,
    "wide_line": _wide_line,
    "row_counts": lambda rng, shape, dtype: row_counts(shape[0]).astype(np.float64),
    "nan_past_rows": _nan_past_rows,
    "arange": lambda rng, shape, dtype: np.arange(shape[0], dtype=np.float64),
    "cu_seqlens": _cu_seqlens(1),
    "cu_seqlens_x40": _cu_seqlens(40),
    "zero_tail": _zero_tail,
}


def _row_strided(values: Array) -> Array:
    wide = np.zeros((*values.shape[:-1], values.shape[-1] + 8), values.dtype)
    wide[..., : values.shape[-1]] = values
    return wide[..., : values.shape[-1]]


def _column_strided(values: Array) -> Array:
    return np.ascontiguousarray(values.T).T


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "contiguous": np.ascontiguousarray,
    "row_strided": _row_strided,
    "column_strided": _column_strided,
    "token_stride_1": _column_strided,
}
