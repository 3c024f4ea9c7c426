"""Rounding onto the grids of fp8, int8 and ue8m0: to nearest even, saturating, NaN kept."""

import triton
import triton.language as tl

from polyfuse.triton_impl._common import INTERPRETED

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
