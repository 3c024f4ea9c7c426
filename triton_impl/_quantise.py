"""Rounding onto the grids of fp8, int8 and ue8m0: to nearest even, saturating, NaN kept."""

import triton
import triton.language as tl

from polyfuse.spec.block_quant import LEAST_DIVISOR
from polyfuse.triton_impl._common import INTERPRETED

LEAST = tl.constexpr(LEAST_DIVISOR)
INT8_SHIFT = tl.constexpr(12582912.0)  # 1.5 * 2**23: float32 has step 1 there, and its low byte is the integer's


@triton.jit
def quantise(value, QMAX: tl.constexpr, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """fp32 `value` as FORMAT, in `dtype`: int8, an fp8 type that the device converts to, or uint8 for its code."""
    if FORMAT == "int8":
        clamped = tl.minimum(tl.maximum(value, -QMAX), QMAX)
        code = (clamped + INT8_SHIFT).to(tl.int32, bitcast=True)
        return tl.where(value == value, code, 0).to(tl.int8)
    elif dtype == tl.uint8:
        return fp8_code(value, QMAX, FORMAT)
    else:
        return value.to(dtype)


@triton.jit
def fp8_code(value, QMAX: tl.constexpr, FORMAT: tl.constexpr):
    """The byte of `value` in an fp8 format, by integer arithmetic."""
    MANTISSA: tl.constexpr = 2 if FORMAT == "float8_e5m2" else 3
    BIAS: tl.constexpr = 15 if FORMAT == "float8_e5m2" else (8 if FORMAT == "float8_e4m3fnuz" else 7)
    DROPPED: tl.constexpr = 23 - MANTISSA
    SUBNORMAL_SHIFT: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)  # float32 has the step of the subnormals there
    magnitude = tl.minimum(tl.abs(value), QMAX)
    bits = magnitude.to(tl.uint32, bitcast=True)
    normal = (bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) >> DROPPED
    normal -= (127 - BIAS) << MANTISSA
    subnormal = (magnitude + SUBNORMAL_SHIFT).to(tl.uint32, bitcast=True) & 0xFF
    code = tl.where(magnitude < 2.0 ** (1 - BIAS), subnormal, normal)
    negative = (value.to(tl.uint32, bitcast=True) >> 24) & 0x80
    if FORMAT == "float8_e4m3fnuz":
        code = tl.where(code == 0, 0, code | negative)  # it has no -0: that code is its NaN
        nan = 0x80
    else:
        code = code | negative
        nan = 0x7F
    return tl.where(value == value, code, nan).to(tl.uint8)


@triton.jit
def power_of_two_above(scale):
    """The least power of two that is at least a positive normal `scale`; infinity and NaN stay."""
    bits = (scale.to(tl.uint32, bitcast=True) + 0x7FFFFF) & 0xFF800000
    return tl.where(scale == scale, bits.to(tl.float32, bitcast=True), scale)


@triton.jit
def exponent_byte(scale):
    """The biased exponent of a positive `scale`: 255 for infinity and NaN."""
    return ((scale.to(tl.uint32, bitcast=True) >> 23) & 0xFF).to(tl.uint8)


@triton.jit
def divide(value, scale, POWER_OF_TWO: tl.constexpr, BOUNDED: tl.constexpr):
    """[A, B] / [A], correctly rounded. BOUNDED: no quotient of finite numbers is near overflow.

    One division per scale: with a correctly rounded reciprocal, a product and one correction of it by its exact
    remainder give the rounded quotient (Brisebarre, Muller, Raina, "Accelerating correctly rounded floating-point
    division when the divisor is known in advance", 2004).
    """
    if POWER_OF_TWO:
        return value * tl.div_rn(1.0, scale)[:, None]
    elif INTERPRETED or not BOUNDED:  # the interpreter's fma rounds twice
        return tl.div_rn(value, tl.broadcast_to(scale[:, None], value.shape))
    else:
        reciprocal = tl.div_rn(1.0, scale)[:, None]
        minus = tl.where(scale == float("inf"), 0.0, -scale)[:, None]  # so that finite / inf is 0
        quotient = value * reciprocal
        corrected = tl.fma(tl.fma(quotient, minus, value), reciprocal, quotient)
        return tl.where(quotient == 0.0, quotient, corrected)  # the correction of -0 is +0


@triton.jit
def e2m1_code(value):
    """The four bits of `value` in float4_e2m1, saturating; 0 for NaN."""
    magnitude = tl.minimum(tl.abs(value), 6.0)
    bits = magnitude.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - (126 << 1)
    # float32 has the step of the numbers below 1 from 2**22 on.
    subnormal = (magnitude + 4194304.0).to(tl.uint32, bitcast=True) & 0xFF
    code = tl.where(magnitude < 1.0, subnormal, normal) | ((value.to(tl.uint32, bitcast=True) >> 28) & 8)
    return tl.where(value == value, code, 0)


@triton.jit
def swizzled(row, group, COLUMNS: tl.constexpr):
    """The byte of a scale in blocks of 128 rows and 4 groups, of which COLUMNS lie side by side."""
    block = (row // 128) * COLUMNS + (group // 4).to(tl.int64)
    return block * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + group % 4


@triton.jit
def scales_of(
    amax,
    factor,
    scale_ub,
    QMAX: tl.constexpr,
    FLOOR: tl.constexpr,
    FORMAT: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):
    """The scale of each largest magnitude, of e4m3 before its rounding."""
    if FORMAT == "e4m3":
        scale = tl.div_rn(amax, QMAX * factor)
        scale = tl.where(amax < float("inf"), tl.where(scale > 448.0, 448.0, scale), float("nan"))
    else:
        if RECIPROCAL:
            scale = amax * (1 / QMAX)
        else:
            scale = tl.div_rn(amax, QMAX)
        if scale_ub is not None:
            scale = tl.where((scale > scale_ub) & (amax < float("inf")), scale_ub, scale)
        scale = tl.where(scale < FLOOR, FLOOR, scale)
        if FORMAT != "float32":
            scale = power_of_two_above(scale)
    return scale


@triton.jit
def e4m3_number(code):
    """The float32 of a code of float8_e4m3fn that has no sign."""
    code = code.to(tl.uint32)
    normal = ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    number = tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)
    return tl.where(code == 0x7F, float("nan"), number)


@triton.jit
def store_groups(
    y,  # [PAIRS, LANES] of fp32, 0 behind the last column of a group
    pair,  # [PAIRS], row * GROUPS + group if live
    row,  # [PAIRS] of an expert, or of all
    group,  # [PAIRS]
    live,  # [PAIRS], whether to store
    q_at,  # where the expert's q begins
    scale_at,  # where its scales begin
    global_scale_ptr,  # or None
    scale_ub,
    scale_row,
    scale_group,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    QMAX: tl.constexpr,
    FLOOR: tl.constexpr,
    FORMAT: tl.constexpr,
    SWIZZLED: tl.constexpr,
    PADDING: tl.constexpr,  # the byte behind the last group of ue8m0_packed
    RECIPROCAL: tl.constexpr,
):
    """Quantise groups of columns, and store them and their scales."""
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    PAIRS: tl.constexpr = y.shape[0]
    LANES: tl.constexpr = y.shape[1]
    # As integers the magnitudes have the same order, and NaN is above infinity.
    amax = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)  # [PAIRS]
    factor = 1.0
    if global_scale_ptr is not None:
        factor = tl.load(global_scale_ptr)
    scale = scales_of(amax, factor, scale_ub, QMAX, FLOOR, FORMAT, RECIPROCAL)
    if FORMAT == "e4m3":
        code = fp8_code(scale, 448.0, "float8_e4m3fn")
        divisor = e4m3_number(code) * factor
        ratio = tl.div_rn(y, tl.broadcast_to(divisor[:, None], y.shape))
        ratio = tl.where(code[:, None] == 0, 0.0, ratio)
    else:
        divisor = scale
        if FLOOR == 0:
            divisor = tl.where(scale < LEAST, LEAST, scale)
        ratio = divide(y, divisor, FORMAT != "float32", scale_ub is None)

    if DTYPE == "float4_e2m1":
        low, high = tl.split(tl.reshape(e2m1_code(ratio), [PAIRS, LANES // 2, 2]))
        byte = tl.arange(0, LANES // 2)[None, :]
        inside = byte < GROUP // 2
        if D % GROUP != 0:
            inside = inside & ((group * (GROUP // 2))[:, None] + byte < D // 2)
        at = (row.to(tl.int64) * (D // 2) + group * (GROUP // 2))[:, None] + byte
        tl.store(q_at + at, (low | (high << 4)).to(tl.uint8), mask=live[:, None] & inside)
    else:
        q = quantise(ratio, QMAX, DTYPE, q_at.dtype.element_ty)
        lane = tl.arange(0, LANES)[None, :]
        inside = lane < GROUP
        if D % GROUP != 0:
            inside = inside & ((group * GROUP)[:, None] + lane < D)
            at = row.to(tl.int64) * D + group * GROUP
        else:
            at = pair.to(tl.int64) * GROUP
        tl.store(q_at + at[:, None] + lane, q, mask=live[:, None] & inside)

    if SWIZZLED:
        at = scale_at + swizzled(row.to(tl.int64), group, (GROUPS + 3) // 4)
        if FORMAT == "e4m3":
            tl.store(at, fp8_code(scale, 448.0, "float8_e4m3fn"), mask=live)
        else:
            tl.store(at, exponent_byte(scale), mask=live)
    elif FORMAT == "ue8m0_packed":
        at = scale_at + row.to(tl.int64) * scale_row + (group // 4).to(tl.int64) * scale_group
        byte = at.to(tl.pointer_type(tl.uint8), bitcast=True) + group % 4
        tl.store(byte, exponent_byte(scale), mask=live)
        for i in tl.static_range(1, 4 - (GROUPS - 1) % 4):
            tl.store(byte + i, tl.full([PAIRS], PADDING, tl.uint8), mask=live & (group == GROUPS - 1))
    else:
        at = scale_at + row.to(tl.int64) * scale_row + group.to(tl.int64) * scale_group
        if FORMAT == "e4m3":
            tl.store(at, fp8_code(scale, 448.0, "float8_e4m3fn"), mask=live)
        else:
            tl.store(at, scale, mask=live)
