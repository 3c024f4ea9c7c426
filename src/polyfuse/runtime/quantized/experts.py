"""Experts with FP8 weights in blocks of 128 x 128: where the rows of tokens lie, their products and their sums."""

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch.nn.functional import pad

from polyfuse.dispatch import Device, preference, registry, torch_device
from polyfuse.runtime.quantized.activation import QuantizedActivation
from polyfuse.runtime.quantized.gemm import ALIGNED, check_product, gemm_for, product
from polyfuse.spec import FLOATS, dtype_name, fail

KERNELS = "polyfuse.triton_impl._expert_products"
BETWEEN = "silu_mul_block_quant"  # the op between the two products: a backend that runs it multiplies too, if it can
INTEGERS = torch.int32, torch.int64


@dataclass(frozen=True)
class Routing:
    """Where the rows of tokens lie that are sorted by expert, those of an expert behind those of the one before.

    `tokens` [rows] says whose row each is, `ends` [experts] where those of an expert end, as int32, and `places`
    [tokens, k] which row a token's k-th expert has. Rows past the last end are of experts on other devices. An
    expert's rows are in the order of their tokens.
    """

    tokens: torch.Tensor
    ends: torch.Tensor
    places: torch.Tensor


def route(chosen: torch.Tensor, experts: int) -> Routing:
    """The routing of tokens to `chosen` [tokens, k] of `experts`; other numbers are of experts on other devices."""
    kernels = _kernels(chosen.device, torch.float32)
    if kernels and chosen.numel():
        return Routing(*kernels.route(chosen, experts))
    flat = chosen.reshape(-1)
    found, order = torch.where(flat < 0, experts, flat).sort(stable=True)
    numbers = torch.arange(experts, device=found.device, dtype=found.dtype)
    ends = torch.searchsorted(found, numbers, right=True, out_int32=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return Routing(order // chosen.shape[1], ends, places.view(chosen.shape))


def experts_gemm_for(device: torch.device, dtype: torch.dtype) -> str:
    """How `block_scaled_mm_by_expert` computes results of a dtype on a device; "" if it cannot."""
    if _kernels(device, dtype):
        return "a Triton kernel, all experts in one launch"
    found = gemm_for(device, dtype)
    return found and f"{found}, expert by expert"


def reads_ends(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the host reads there how many rows each expert has, which no graph can hold."""
    return _kernels(device, dtype) is None


def block_scaled_mm_by_expert(
    activation: QuantizedActivation,
    weights: torch.Tensor,
    weight_scales: torch.Tensor,
    expert_ends: torch.Tensor,
    dtype: torch.dtype,
    *,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """`block_scaled_mm` of each expert's rows with its weight of [E, N, K], as `dtype` [rows, N].

    Expert e has the rows from `expert_ends[e - 1]`, the first one from 0, up to `expert_ends[e]`: int32 [E], ascending.
    Row i is that of the activation, or its row `tokens[i]`, which may be there many times. What rows past the last end
    hold is not defined.

    Where the Triton backend comes first for `silu_mul_block_quant`, on an NVIDIA GPU from compute capability 8.9 on, it
    is one launch, and the host reads nothing. Elsewhere it is `block_scaled_mm` of one expert after the other, and the
    host reads the ends: PyTorch's `scaled_grouped_mm` takes scales of whole rows and those of MXFP8, MXFP4 and NVFP4,
    but not these blocks. Raises `SpecError` for other formats, shapes and dtypes.
    """
    _check(activation, weights, weight_scales, expert_ends, dtype, tokens)
    values, scales = activation.values, activation.scales
    kernels = _kernels(values.device, dtype)
    if kernels:
        out: torch.Tensor = kernels.products(values, scales, weights, weight_scales, expert_ends, tokens, dtype)
        return out
    rows = len(values) if tokens is None else len(tokens)
    out = torch.empty((rows, weights.shape[1]), dtype=dtype, device=values.device)
    begin = 0
    for expert, end in enumerate(expert_ends.clamp(max=rows).tolist()):
        if begin < end:
            own = slice(begin, end) if tokens is None else tokens[begin:end]
            parts = values.view(torch.uint8)[own], scales[own]
            if values.device.type != "cpu" and (missing := (begin - end) % ALIGNED):
                parts = pad(parts[0], (0, 0, 0, missing)), pad(parts[1], (0, 0, 0, missing))
            result = product(parts[0].view(values.dtype), parts[1], weights[expert], weight_scales[expert], dtype)
            out[begin:end] = result[: end - begin]
        begin = max(begin, end)
    return out


def sums_of_experts(results: torch.Tensor, weights: torch.Tensor, routing: Routing, *, by_number: bool) -> torch.Tensor:
    """Each token's sum of its experts' `results` [rows, N] by its routing `weights` [tokens, k], as [tokens, N].

    Weights and products are rounded to the dtype of the results. The sum is in float32, in the order of the experts'
    numbers or else of k, and rounded once. Rows past the last expert's end add nothing.
    """
    kernels = _kernels(results.device, results.dtype)
    if kernels:
        out: torch.Tensor = kernels.sums(results, weights, routing.places, routing.ends, by_number)
        return out
    places = routing.places
    if by_number:  # as rows are sorted by it
        order = places.argsort(1)
        places, weights = places.gather(1, order), weights.gather(1, order)
    weighted = results[places] * weights[..., None].to(results.dtype)
    return weighted.masked_fill_((places >= routing.ends[-1])[..., None], 0.0).sum(1)


def _kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """The Triton backend's module of these kernels, or None where it does not come first or cannot."""
    found = torch_device(device)
    comes_first = preference(BETWEEN, "torch", found, None).names[0] == "triton"
    return _able_kernels(found, dtype) if comes_first else None


@lru_cache(maxsize=64)
def _able_kernels(device: Device, dtype: torch.dtype) -> Any:
    """The module of these kernels if it can be imported and multiplies on such a device, or None."""
    if registry().get("triton").missing(BETWEEN):
        return None
    kernels = import_module(KERNELS)
    if device.kind == "cpu":
        able = kernels.INTERPRETED.value
    else:
        able = device.kind == "cuda" and (device.arch or (0, 0)) >= kernels.ARCH
    return kernels if able and dtype in kernels.DTYPES else None


def _check(
    activation: QuantizedActivation,
    weights: torch.Tensor,
    weight_scales: torch.Tensor,
    ends: torch.Tensor,
    dtype: torch.dtype,
    tokens: torch.Tensor | None,
) -> None:
    op = "block_scaled_mm_by_expert"
    for name, array in (("weights", weights), ("weight_scales", weight_scales)):
        if array.ndim != 3 or not len(array):
            fail(op, name, "3 dimensions, the first of experts", list(array.shape))
    if len(weights) != len(weight_scales):
        fail(op, "weight_scales", f"those of {len(weights)} experts", len(weight_scales))
    check_product(activation, weights[0], weight_scales[0])
    if dtype_name(dtype) not in FLOATS:
        fail(op, "dtype", f"one of {', '.join(FLOATS)}", dtype_name(dtype))
    if ends.dtype != torch.int32 or list(ends.shape) != [len(weights)]:
        fail(op, "expert_ends", f"int32 [{len(weights)}]", f"{dtype_name(ends.dtype)} {list(ends.shape)}")
    if tokens is not None and (tokens.dtype not in INTEGERS or tokens.ndim != 1):
        fail(op, "tokens", "int32 or int64 [rows]", f"{dtype_name(tokens.dtype)} {list(tokens.shape)}")
    for name, array in (
        ("weights", weights),
        ("weight_scales", weight_scales),
        ("expert_ends", ends),
        ("tokens", tokens),
    ):
        if array is not None and array.device != activation.values.device:
            fail(op, name, f"an array on {activation.values.device}", array.device)
