"""What the quantising ops share on the host."""

from dataclasses import dataclass
from math import log2, prod
from typing import Any

import torch

from polyfuse._torch.memory import allocator, contiguous_strides
from polyfuse.spec.block_quant import FLOAT4, QMAX, scale_floor, scale_form
from polyfuse.triton_impl._common import INTERPRETED, next_power_of_2

# (up to this many bytes that are read, bytes of them per program, per thread), of groups from 128 columns on, and
# smaller. A program takes at least one group. Few rows need many programs; of many rows, each thread has 32 bytes or
# more under way.
TILES = ((2**19, 1024, 32), (2**63, 4096, 64))
SMALL_GROUP_TILES = ((2**19, 1024, 32), (2**63, 8192, 64))
EXPERT_ELEMENTS = 2048, 16  # of a program, of a thread, where a program takes many tiles: the next is on its way
WIDEST_GROUP = 2**15
WIDE_PAIRS = 2**31  # from here on pairs are numbered in 64 bits

# The parameters of the kernels whose value, or alignment, makes no other kernel.
ANY_VALUE = [
    *("num_rows_ptr", "ends_ptr", "global_scale_ptr"),
    *("rows", "experts", "scale_expert", "scale_row", "scale_group"),
]


@dataclass(frozen=True, slots=True)
class Results:
    """The results of calls of one kind, and what a kernel takes to write them."""

    q_shape: tuple[int, ...]
    q_strides: tuple[int, ...]
    q_dtype: torch.dtype
    scale_shape: tuple[int, ...]
    scale_strides: tuple[int, ...]
    scale_dtype: torch.dtype
    codes: bool  # q is written as bytes
    numbers: tuple[int, ...]  # scale_expert, scale_row, scale_group
    fixed: tuple[Any, ...]  # D and GROUP to RECIPROCAL of `store_groups`
    first: int | float | None  # what the scales hold before the kernel writes, as it is stored

    def allocate(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """New q and scale."""
        make = allocator(device)
        q = make(self.q_shape, self.q_strides, self.q_dtype)
        if self.first is not None:
            return q, self._filled(device, self.first)
        return q, make(self.scale_shape, self.scale_strides, self.scale_dtype)

    def writable(self, q: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same memory, in the dtypes that a kernel writes."""
        return (
            q.view(torch.uint8) if self.codes else q,
            scale.view(torch.uint8) if self.scale_dtype is torch.float8_e4m3fn else scale,
        )

    def _filled(self, device: torch.device, number: int | float) -> torch.Tensor:
        size = 1 + sum((n - 1) * step for n, step in zip(self.scale_shape, self.scale_strides, strict=True))
        if not prod(self.scale_shape):
            size = 0
        storage = torch.uint8 if self.scale_dtype is torch.float8_e4m3fn else self.scale_dtype
        buffer = torch.full((size,), number, dtype=storage, device=device)
        return buffer.view(self.scale_dtype).as_strided(self.scale_shape, self.scale_strides)


def results(
    lead: tuple[int, ...],
    width: int,
    device: torch.device,
    masked: bool,
    with_ends: bool,
    group_size: int,
    quant_dtype: str,
    scale_format: str,
    scale_layout: str,
    scale_min: float | None,
    reciprocal: bool,
    fill: float | None,
) -> Results:
    """The results of rows [*lead, width], some of which are not valid if `masked` or `with_ends`."""
    form = scale_form(lead, width, group_size, scale_format, scale_layout, masked)
    swizzled = scale_layout == "swizzled_128x4"
    rows, columns = (prod(lead[1:]) if masked else prod(lead)), form.shape[-1]
    if swizzled:
        numbers = prod(form.shape[-2:]), 0, 0
        padded = rows % 128 or -(-width // group_size) % 4
    elif form.strides is None:
        numbers, padded = (rows * columns, columns, 1), False
    else:
        numbers = form.strides[0] if masked else 0, 1, form.strides[-1]
        padded = form.strides[-1] != rows
    byte = _fill_number(fill, scale_format, swizzled)
    wanted = (masked or with_ends or padded) and (fill is not None or swizzled)
    four_bit = quant_dtype == FLOAT4
    q_shape = *lead, width // 2 if four_bit else width
    q_dtype = torch.uint8 if four_bit else getattr(torch, quant_dtype)
    return Results(
        q_shape=q_shape,
        q_strides=contiguous_strides(q_shape),
        q_dtype=q_dtype,
        scale_shape=form.shape,
        scale_strides=form.strides or contiguous_strides(form.shape),
        scale_dtype=getattr(torch, form.dtype),
        codes=quant_dtype not in ("int8", FLOAT4) and not _converts(device, quant_dtype),
        numbers=numbers,
        fixed=(
            width,
            group_size,
            quant_dtype,
            QMAX[quant_dtype],
            scale_floor(quant_dtype, scale_min, scale_format),
            scale_format,
            swizzled,
            int(byte) if scale_format == "ue8m0_packed" else 0,
            reciprocal,
        ),
        first=None if not wanted else _four_times(int(byte)) if scale_format == "ue8m0_packed" else byte,
    )


def _fill_number(fill: float | None, scale_format: str, swizzled: bool) -> int | float:
    """What is stored for `fill`: an exponent, the code of an e4m3 number, or itself."""
    if fill is None:
        return 0
    if scale_format == "ue8m0_packed" or (scale_format == "ue8m0" and swizzled):
        return int(log2(fill)) + 127
    return int(torch.tensor(fill).to(torch.float8_e4m3fn).view(torch.uint8)) if scale_format == "e4m3" else fill


def _four_times(byte: int) -> int:
    return int.from_bytes(bytes([byte] * 4), "little", signed=True)


def _converts(device: torch.device, quant_dtype: str) -> bool:
    """Whether Triton's cast to this fp8 dtype is right there: to nearest even, saturating, from fp32 at once."""
    if INTERPRETED.value or device.type != "cuda" or torch.version.hip or quant_dtype == "float8_e4m3fnuz":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def tile(group: int, itemsize: int, elements: int, experts: bool) -> tuple[int, int]:
    """How many groups and warps a program has, if `itemsize` bytes are read for each element of the result."""
    columns = next_power_of_2(group)
    tiles = TILES if group >= 128 else SMALL_GROUP_TILES
    tile_bytes, thread_bytes = next(t[1:] for t in tiles if elements * itemsize <= t[0])
    if experts and elements * itemsize > tiles[0][0]:
        tile_bytes, thread_bytes = (number * itemsize for number in EXPERT_ELEMENTS)
    groups = max(1, tile_bytes // itemsize // columns)
    return groups, min(32, max(4, groups * columns * itemsize // thread_bytes // 32))
