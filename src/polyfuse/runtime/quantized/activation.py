"""`QuantizedActivation`: what a quantising op hands to a GEMM, checked once against the ops' spec."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch

import polyfuse
from polyfuse.spec import OPS, Output, bind, dtype_name, fail
from polyfuse.spec.block_quant import FLOAT4

_SPEC = OPS["block_quant"]  # every quantising op has its results
# A parameter without a default is a required array, which has to be given.
_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {**{tensor.name: None for tensor in _SPEC.tensors}, **{attr.name: attr.default for attr in _SPEC.attrs}}
)


@lru_cache(maxsize=1024)
def _results(format: "QuantizedFormat", shape: tuple[int, ...]) -> tuple[Output, Output]:
    """What the spec says of a call on an activation of this shape, whose dtype does not matter."""
    stand_in = torch.empty(shape, dtype=torch.float32, device="meta")
    arguments = {**_DEFAULTS, **format.options, "x": stand_in}
    if format.per_expert:
        arguments["num_rows"] = torch.empty(shape[0], dtype=torch.int32, device="meta")
    values, scales = bind(_SPEC, arguments).outputs
    return values, scales


@dataclass(frozen=True)
class QuantizedFormat:
    """How an activation is quantised, in the terms of `polyfuse.block_quant`, which says what each of them means.

    `per_expert` is for rows [E, T] of a call with `num_rows`: each expert then has a buffer of scales of its own, in
    every layout but row_major. Raises `SpecError` for what the op's spec does not know.
    """

    group_size: int = 128
    quant_dtype: str = "float8_e4m3fn"
    scale_format: str = "float32"
    scale_layout: str = "row_major"
    per_expert: bool = False

    def __post_init__(self) -> None:
        self.results((1, 1, 2) if self.per_expert else (1, 2))

    @property
    def options(self) -> dict[str, Any]:
        """The options of a quantising op that give this format."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "per_expert"}

    def results(self, shape: tuple[int, ...]) -> tuple[Output, Output]:
        """The arrays of values and of scales that `block_quant` returns for an activation of a shape [..., D]."""
        return _results(self, shape)


FP8_BLOCKS = QuantizedFormat()


@dataclass(frozen=True, eq=False)
class QuantizedActivation:
    """An activation [..., D] after one of the quantising ops.

    `values` and `scales` are the op's results q and scale, as its spec lays them out for `format`. `global_scale` is
    the one that the op was given, for scales of format e4m3. Raises `SpecError` for arrays of other shapes, dtypes or
    strides, or on different devices.
    """

    values: torch.Tensor
    scales: torch.Tensor
    format: QuantizedFormat = FP8_BLOCKS
    global_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("values", "scales"):
            if not isinstance(getattr(self, name), torch.Tensor):
                fail("QuantizedActivation", name, "a tensor", type(getattr(self, name)).__name__)
        if not isinstance(self.format, QuantizedFormat):
            fail("QuantizedActivation", "format", "a QuantizedFormat", type(self.format).__name__)
        if self.values.ndim < 2 + self.format.per_expert:
            fail("QuantizedActivation", "values", f"{2 + self.format.per_expert} dimensions", self.values.ndim)
        for name, array, expected in zip(
            ("values", "scales"), (self.values, self.scales), self.format.results(self.shape), strict=True
        ):
            _check(name, array, expected)
        if self.values.device != self.scales.device:
            fail("QuantizedActivation", "scales", f"an array on {self.values.device}", self.scales.device)
        if self.global_scale is not None and self.format.scale_format != "e4m3":
            fail("QuantizedActivation", "global_scale", "None without scale_format=e4m3", "a tensor")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what was quantised."""
        *lead, width = self.values.shape
        return (*lead, width * 2 if self.format.quant_dtype == FLOAT4 else width)

    def take(self, rows: torch.Tensor) -> "QuantizedActivation":
        """The rows [T] of an activation [T, D] that an index names, in its order. Raises `SpecError` for other layouts.

        Rows are quantised one by one: taken afterwards they are what the op makes of the rows taken before.
        """
        if self.values.ndim != 2 or self.format.scale_layout not in ("row_major", "col_major"):
            got = f"{self.values.ndim} dimensions, {self.format.scale_layout}"
            fail("QuantizedActivation.take", "self", "[T, D] with scales row_major or col_major", got)
        values = self.values.view(torch.uint8).index_select(0, rows).view(self.values.dtype)
        if self.format.scale_layout == "row_major":
            return QuantizedActivation(values, self.scales.index_select(0, rows), self.format, self.global_scale)
        return QuantizedActivation(values, self.scales.t().index_select(1, rows).t(), self.format, self.global_scale)


def block_quantized(x: torch.Tensor, format: QuantizedFormat = FP8_BLOCKS, **options: Any) -> QuantizedActivation:
    """`polyfuse.block_quant` of x; `options` are its others."""
    values, scales = polyfuse.block_quant(x, **format.options, **options)
    return QuantizedActivation(values, scales, format, options.get("global_scale"))


def silu_mul_block_quantized(
    x: torch.Tensor, format: QuantizedFormat = FP8_BLOCKS, **options: Any
) -> QuantizedActivation:
    """`polyfuse.silu_mul_block_quant` of x; `options` are its others, `up` among them."""
    values, scales = polyfuse.silu_mul_block_quant(x, **format.options, **options)
    return QuantizedActivation(values, scales, format, options.get("global_scale"))


def rms_norm_block_quantized(
    x: torch.Tensor, weight: torch.Tensor, format: QuantizedFormat = FP8_BLOCKS, **options: Any
) -> tuple[QuantizedActivation, torch.Tensor]:
    """`polyfuse.rms_norm_block_quant` of x and its sum with the residual; `options` are the op's others."""
    values, scales, total = polyfuse.rms_norm_block_quant(x, weight, **format.options, **options)
    return QuantizedActivation(values, scales, format, options.get("global_scale")), total


def _check(name: str, array: torch.Tensor, expected: Output) -> None:
    if tuple(array.shape) != expected.shape:
        fail("QuantizedActivation", name, f"shape {list(expected.shape)}", list(array.shape))
    if dtype_name(array.dtype) != expected.dtype:
        fail("QuantizedActivation", name, f"dtype {expected.dtype}", dtype_name(array.dtype))
    strides = expected.strides or _contiguous(expected.shape)
    if array.numel() and any(
        size > 1 and got != wanted for size, got, wanted in zip(array.shape, array.stride(), strides, strict=True)
    ):
        fail("QuantizedActivation", name, f"strides {list(strides)}", list(array.stride()))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
