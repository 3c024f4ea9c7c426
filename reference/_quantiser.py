"""How the oracles quantise a y: the formula of `polyfuse.spec.block_quant`, and the intervals of q and scale."""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyfuse.reference._numerics import F64, HALF_BYTE, Array, Exact, round_to, to_f64
from polyfuse.reference._oracle import Error
from polyfuse.spec import Output
from polyfuse.spec.block_quant import (
    FLOAT4,
    LARGEST_E4M3,
    LEAST_DIVISOR,
    QMAX,
    SWIZZLED_COLUMNS,
    SWIZZLED_ROWS,
    scale_floor,
)

WITHOUT_NAN = ("int8", FLOAT4)  # q is 0 where it would be NaN


@dataclass(frozen=True)
class Quantiser:
    """The arguments by which an op quantises."""

    num_rows: Array | None
    expert_ends: Array | None
    global_scale: Array | None
    group_size: int
    quant_dtype: str
    scale_format: str
    scale_layout: str
    scale_ub: float | None
    scale_min: float | None
    reciprocal: bool
    expert_alignment: int
    fill: float | None

    @classmethod
    def of(cls, given: Any) -> "Quantiser":
        """Those of an op's arguments."""
        return cls(**{field.name: getattr(given, field.name) for field in fields(cls)})

    @property
    def power_of_two(self) -> bool:
        """Whether scales are rounded up to powers of two."""
        return self.scale_format.startswith("ue8m0")

    @property
    def as_exponents(self) -> bool:
        """Whether scales are stored as bytes that hold their exponents."""
        return self.scale_format == "ue8m0_packed" or (self.power_of_two and self.scale_layout == "swizzled_128x4")


class Interval(NamedTuple):
    """An exact value, and the ends of what a right backend may have in its place."""

    value: F64
    low: F64
    high: F64


def or_nan(y: Interval, either: Any) -> Interval:
    """The interval, but NaN or infinity where `either` is true."""
    return Interval(
        np.where(either, np.nan, y.value), np.where(either, np.inf, y.low), np.where(either, np.inf, y.high)
    )


def quantise(y: F64, by: Quantiser) -> tuple[F64, F64]:
    """q and scale as they are stored, but for the last rounding of a q that is no pair."""
    amax = np.abs(grouped(y, by.group_size)).max(-1, initial=0.0)
    scale = bounded_scale(raw_scale(amax, by), amax, by)
    valid = valid_rows(y.shape[:-1], by)
    q = np.clip(ratio(y, divisors(scale, by, y.shape[-1])), -QMAX[by.quant_dtype], QMAX[by.quant_dtype])
    if by.quant_dtype in WITHOUT_NAN:
        q = np.where(np.isnan(q), 0.0, q)
    if by.quant_dtype == FLOAT4:
        q = pairs(codes(q))
    return np.where(valid, q, 0.0), stored(scale, by, 0.0)


def grouped(y: F64, group_size: int) -> F64:
    """[..., D] as [..., G, group_size], with zeros behind the last column."""
    columns = np.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, -y.shape[-1] % group_size)])
    return columns.reshape(*y.shape[:-1], columns.shape[-1] // group_size, group_size)


def raw_scale(amax: F64, by: Quantiser) -> F64:
    """amax / qmax, or the product with the reciprocal, rounded to float32 twice; of e4m3 by global_scale too."""
    qmax = QMAX[by.quant_dtype]
    if by.reciprocal:
        return to_f64(round_to(amax * float(np.float32(1 / qmax)), "float32"))
    return amax / (qmax * global_factor(by))


def global_factor(by: Quantiser) -> float:
    """global_scale, or 1."""
    return 1.0 if by.global_scale is None else float(by.global_scale)


def bounded_scale(scale: F64, amax: F64, by: Quantiser) -> F64:
    """A scale between the floor and `scale_ub`, which an infinite amax passes, in the numbers of its format."""
    if by.scale_format == "e4m3":
        return to_f64(round_to(np.where(np.isfinite(amax), np.minimum(scale, LARGEST_E4M3), np.nan), "float8_e4m3fn"))
    if by.scale_ub is not None:
        scale = np.where(np.isfinite(amax), np.minimum(scale, float(np.float32(by.scale_ub))), scale)
    scale = np.maximum(scale, float(np.float32(scale_floor(by.quant_dtype, by.scale_min, by.scale_format))))
    return power_of_two_above(scale) if by.power_of_two else scale


def power_of_two_above(scale: F64) -> F64:
    """The least power of two that is at least `scale`; infinity and NaN stay."""
    mantissa, exponent = np.frexp(scale)
    return np.where(np.isfinite(scale), np.ldexp(1.0, exponent - (mantissa == 0.5)), scale)


def divisors(scale: F64, by: Quantiser, width: int) -> F64:
    """What y is divided by [..., width]."""
    if by.scale_format == "e4m3":
        scale = scale * global_factor(by)
    else:
        floor = scale_floor(by.quant_dtype, by.scale_min, by.scale_format)
        scale = np.maximum(scale, float(np.float32(floor or LEAST_DIVISOR)))
    return np.repeat(scale, by.group_size, axis=-1)[..., :width]


def ratio(y: F64, divisor: F64) -> F64:
    """y / divisor, and 0 where the divisor is 0, as an e4m3 scale may be."""
    return np.where(divisor == 0, 0.0, y / np.where(divisor == 0, 1.0, divisor))


def codes(q: F64) -> NDArray[np.uint8]:
    """The four bits of each number of float4_e2m1."""
    return round_to(q, HALF_BYTE).view(np.uint8) & np.uint8(15)


def pairs(code: NDArray[np.uint8]) -> F64:
    """Two numbers of four bits a byte, the first in the low half, as numbers."""
    return to_f64(code[..., 0::2] + 16 * code[..., 1::2])


def exponent_bytes(scale: F64) -> F64:
    """Biased exponents of powers of two, 255 for NaN and infinity."""
    _, exponent = np.frexp(np.where(np.isfinite(scale), scale, 1.0))
    return np.where(np.isfinite(scale), exponent - 1 + 127, 255).astype(np.float64)


def valid_rows(lead: tuple[int, ...], by: Quantiser) -> Any:
    """Whether each row counts: [*lead, 1]."""
    if by.num_rows is not None:
        return (np.arange(lead[1]) < to_f64(by.num_rows)[:, None])[..., None]
    if by.expert_ends is not None:
        return owned_rows(lead[0], by.expert_ends, by.expert_alignment)[:, None]
    return np.ones((*lead, 1), bool)


def owned_rows(rows: int, ends: Array, alignment: int) -> NDArray[np.bool_]:
    """Whether each of so many rows is an expert's."""
    owned = np.zeros(rows, bool)
    first = 0
    for end in map(int, ends):
        owned[first:end] = True
        first = max(0, -(-end // alignment) * alignment)
    return owned


def stored(scale: F64, by: Quantiser, unwritten: float) -> F64:
    """Scales [*lead, groups] as numbers in their array, a packed one byte by byte; `unwritten` ones are so."""
    lead = scale.shape[:-1]
    valid = valid_rows(lead, by)
    swizzled = by.scale_layout == "swizzled_128x4"
    padding = 0.0 if by.fill is None else float(stored_alone(np.array([by.fill]), by)[0])
    missing = padding if by.fill is not None or swizzled else unwritten
    numbers = stored_alone(scale, by)
    if by.scale_format == "ue8m0_packed":
        numbers = np.pad(numbers, [(0, 0)] * len(lead) + [(0, -scale.shape[-1] % 4)], constant_values=padding)
    numbers = np.where(valid, numbers, missing)
    if swizzled:
        rows = (1, int(np.prod(lead))) if by.num_rows is None else lead
        blocks = swizzle(numbers.reshape(*rows, scale.shape[-1]), padding)
        return blocks[0] if by.num_rows is None else blocks
    return numbers


def stored_alone(scale: F64, by: Quantiser) -> F64:
    """A scale as the number that is stored."""
    if by.as_exponents:
        return exponent_bytes(scale)
    return to_f64(round_to(scale, "float8_e4m3fn")) if by.scale_format == "e4m3" else scale


def swizzle(scale: F64, padding: float) -> F64:
    """Scales [experts, rows, groups] in blocks of 128 rows and 4 groups, in the order of memory."""
    experts, rows, groups = scale.shape
    pad = [(0, 0), (0, -rows % SWIZZLED_ROWS), (0, -groups % SWIZZLED_COLUMNS)]
    scale = np.pad(scale, pad, constant_values=padding)
    _, rows, groups = scale.shape
    blocks = scale.reshape(
        experts, rows // 128, 4, 32, groups // 4, 4
    )  # r // 128, r % 128 // 32, r % 32; c // 4, c % 4
    return blocks.transpose(0, 1, 4, 3, 2, 5).reshape(experts, rows, groups)


def store(value: F64, output: Output) -> Array:
    """A result rounded to its dtype; of a packed scale the bytes, four to an int32."""
    return (
        np.ascontiguousarray(round_to(value, "uint8")).view(np.int32)
        if output.dtype == "int32"
        else round_to(value, output.dtype)
    )


def bounds(y: Interval, given: Any, error: Error) -> dict[str, Exact]:
    """What q and scale must lie in, of a y known to an interval."""
    by = Quantiser.of(given)
    scale = _scale_interval(y, by, *error("scale"))
    q = _quantised_interval(y, scale, by, error("q")[0])
    valid = valid_rows(y.value.shape[:-1], by)
    ends = np.where(valid, q.value, 0.0), np.where(valid, q.low, -np.inf), np.where(valid, q.high, np.inf)
    scales = stored(scale.value, by, 0.0), stored(scale.low, by, -np.inf), stored(scale.high, by, np.inf)
    halves = HALF_BYTE if by.quant_dtype == FLOAT4 else ""
    packed = "uint8" if by.scale_format == "ue8m0_packed" else ""
    return {"q": Exact(*ends, parts=halves), "scale": Exact(scales[0], scales[1], scales[2], parts=packed)}


def _scale_interval(y: Interval, by: Quantiser, relative: float, flush: float) -> Interval:
    """Scales [..., groups] before they are stored."""
    value, low, high = (grouped(part, by.group_size) for part in y)
    nearest = np.where((low <= 0) & (high >= 0), 0.0, np.minimum(np.abs(low), np.abs(high)))
    amax = np.abs(value).max(-1, initial=0.0)
    least, most = nearest.max(-1, initial=0.0), np.maximum(np.abs(low), np.abs(high)).max(-1, initial=0.0)
    # Rounded up to a power of two, an exact quotient must not be pushed over one.
    slack = (0.0, -relative, 0.0 if by.power_of_two else relative)
    scales = []
    for end, widen, least_normal in zip((amax, least, most), slack, (0.0, flush, 0.0), strict=True):
        scale = raw_scale(end, by) * (1 + widen)
        scale = np.where(scale < least_normal, 0.0, scale)
        scales.append(bounded_scale(scale, amax, by))
    return Interval(*scales)


def _quantised_interval(y: Interval, scale: Interval, by: Quantiser, relative: float) -> Interval:
    """q [..., D] before rounding."""
    qmax = QMAX[by.quant_dtype]
    s, s_low, s_high = (divisors(part, by, y.value.shape[-1]) for part in scale)
    low = ratio(y.low, np.where(y.low >= 0, s_high, s_low))
    high = ratio(y.high, np.where(y.high >= 0, s_low, s_high))
    some = (s_low == 0) & (s_high > 0)  # an e4m3 scale that is 0, and q with it, or next to 0
    low = np.where(some, np.where(y.low < 0, -qmax, 0), low)
    high = np.where(some, np.where(y.high > 0, qmax, 0), high)
    unrounded = (y.low == y.high) & (s_low == s_high) & (np.frexp(s)[0] == 0.5)
    slack = np.where(unrounded, 0.0, relative)
    ends = (ratio(y.value, s), low - slack * np.abs(low), high + slack * np.abs(high))
    missing = 0.0 if by.quant_dtype in WITHOUT_NAN else np.nan
    clipped = (np.clip(end, -qmax, qmax) for end in ends)
    return Interval(*(np.where(np.isnan(end), missing, end) for end in clipped))
