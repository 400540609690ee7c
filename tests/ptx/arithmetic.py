"""What PTX instructions compute, on numpy vectors with one number per thread.

Written from the formulas of the PTX ISA. Tensor cores, ex2 and the other approximations are
idealised: they round once, from float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[Any]

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
b1 = np.bool_

WORD = u8(0xFFFFFFFF)
NAN = np.array(0x7FFFFFFF, u4).view(f4)
SMALLEST_NORMAL = f4(2.0**-126)
_MORE_BITS = i8((1 << 29) - 1)  # of a float64 than of a float32
_HALF_UNIT = i8(1 << 28)  # of a float32, among them


def flush(x: Vector) -> Vector:
    """Subnormals become zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(f4(0), x), x)


def fma(a: Vector, b: Vector, c: Vector) -> Vector:
    """Float32, rounded once; only subnormal results may be off by their last bit.

    The float64 product is exact, and the float64 sum rounds to float32 as the exact sum would, but
    where it lies halfway between two float32 numbers.
    """
    product = a.astype(f8) * b.astype(f8)
    total = product + c.astype(f8)
    result = total.astype(f4)
    halfway = (total.view(i8) & _MORE_BITS) == _HALF_UNIT
    if np.count_nonzero(halfway):
        exact = _rounded_once(product[halfway], c[halfway].astype(f8), total[halfway])
        result[halfway] = exact
    return result


def fma_all(a: list[Vector], b: list[Vector], c: list[Vector]) -> Vector:
    """Many at once; a row for each."""
    return fma(*map(np.concatenate, (a, b, c))).reshape(len(a), -1)


def _rounded_once(a: Vector, b: Vector, total: Vector) -> Vector:
    """a + b in float32: the float64 sum is moved off halfway to the side of what it lost."""
    part = total - a
    lost = (a - (total - part)) + (b - part)
    away = np.where(lost == 0, 0, np.where((lost > 0) == (total > 0), 1, -1))
    return (total.view(i8) + away).view(f8).astype(f4)


def fmax(a: Vector, b: Vector) -> Vector:
    """A NaN loses; -0 < +0; of two NaN comes the canonical one."""
    r = np.where(a == b, (a.view(u4) & b.view(u4)).view(f4), np.fmax(a, b))
    return np.where(np.isnan(r), NAN, r)


def fmin(a: Vector, b: Vector) -> Vector:
    r = np.where(a == b, (a.view(u4) | b.view(u4)).view(f4), np.fmin(a, b))
    return np.where(np.isnan(r), NAN, r)


def ex2(x: Vector) -> Vector:
    return np.exp2(x.astype(f8)).astype(f4)


def lg2(x: Vector) -> Vector:
    return np.log2(x.astype(f8)).astype(f4)


def rcp(x: Vector) -> Vector:
    return f4(1) / x


def rsqrt(x: Vector) -> Vector:
    return (1 / np.sqrt(x.astype(f8))).astype(f4)


# Integers


def div(a: Vector, b: Vector) -> Vector:
    if a.dtype.kind == "u":
        return a // b
    down = a // b
    return down + ((a % b != 0) & ((a < 0) != (b < 0)))


def rem(a: Vector, b: Vector) -> Vector:
    return a - div(a, b) * b


def shl(a: Vector, amount: Vector) -> Vector:
    """Shifts by the width or more leave zeros (of a negative number: ones, in shr)."""
    width = 8 * a.itemsize
    shifted = a << (amount & u4(width - 1)).astype(a.dtype)
    return np.where(amount >= width, a.dtype.type(0), shifted)


def shr(a: Vector, amount: Vector) -> Vector:
    width = 8 * a.itemsize
    if a.dtype.kind == "i":
        return a >> np.minimum(amount, u4(width - 1)).astype(a.dtype)
    shifted = a >> (amount & u4(width - 1)).astype(a.dtype)
    return np.where(amount >= width, a.dtype.type(0), shifted)


def mul_hi(a: Vector, b: Vector) -> Vector:
    """The upper half of the product, of 32 or 64 bits."""
    if a.itemsize == 4:
        wide = np.dtype(f"{a.dtype.kind}8").type
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)
    x, y = a.view(u8), b.view(u8)
    x0, x1, y0, y1 = x & WORD, x >> u8(32), y & WORD, y >> u8(32)
    middle = x1 * y0 + (x0 * y0 >> u8(32))
    second = x0 * y1 + (middle & WORD)
    high = x1 * y1 + (middle >> u8(32)) + (second >> u8(32))
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, u8(0)) - np.where(b < 0, x, u8(0))
    return high.view(a.dtype)


def bfe(a: Vector, start: Vector, length: Vector) -> Vector:
    """The bits from start on, extended by the uppermost one if a is signed."""
    start = np.minimum(start & u4(255), u4(32)).astype(u8)
    length = np.minimum(length & u4(255), u4(32)).astype(u8)
    bits = a.view(u4).astype(u8)
    if a.dtype.kind == "u":
        return ((bits >> start) & ((u8(1) << length) - u8(1))).astype(u4)
    last = np.minimum(start + length - u8(1), u8(31))
    sign = np.where(length == 0, u8(0), bits >> last & u8(1))
    extended = bits | np.where(sign == 1, ~WORD, u8(0))  # above bit 31, as a start there reads it
    field = extended >> start & ((u8(1) << length) - u8(1))
    return np.where(sign == 1, field | ~((u8(1) << length) - u8(1)), field).astype(u4).view(i4)


def bfi(a: Vector, b: Vector, start: Vector, length: Vector) -> Vector:
    """b with the low bits of a put in its place from start on."""
    start = np.minimum(start & u4(255), u4(32)).astype(u8)
    length = np.minimum(length & u4(255), u4(32)).astype(u8)
    mask = ((u8(1) << length) - u8(1)) << start
    return ((b & ~mask) | ((a.astype(u8) << start) & mask)).astype(u4)


def prmt(a: Vector, b: Vector, select: Vector) -> Vector:
    both = a.astype(u8) | (b.astype(u8) << u8(32))
    out = np.zeros_like(a)
    for i in range(4):
        chosen = (select >> u4(4 * i)) & u4(15)
        byte = (both >> ((chosen & u4(7)) * u4(8)).astype(u8)).astype(u4) & u4(255)
        signs = np.where(byte & u4(128), u4(255), u4(0))
        out |= np.where(chosen & u4(8), signs, byte) << u4(8 * i)
    return out


def lop3(a: Vector, b: Vector, c: Vector, table: int) -> Vector:
    out = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def shf(low: Vector, high: Vector, amount: Vector, *, left: bool, wrap: bool) -> Vector:
    """The upper (left) or lower half of high:low, shifted."""
    shift = (amount & u4(31) if wrap else np.minimum(amount, u4(32))).astype(u8)
    both = high.astype(u8) << u8(32) | low
    return ((both << shift) >> u8(32) if left else both >> shift).astype(u4)


def clz(a: Vector) -> Vector:
    return u4(32) - np.ceil(np.log2(a.astype(f8) + 1)).astype(u4)


def brev(a: Vector) -> Vector:
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        a = ((a >> u4(shift)) & u4(mask)) | ((a & u4(mask)) << u4(shift))
    return (a >> u4(16)) | (a << u4(16))


# Conversions. Numbers of 16 bits are kept as uint16.


def to_bf16(x: Vector) -> Vector:
    bits = x.view(u4)
    rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
    return np.where(np.isnan(x), u2(0x7FFF), rounded.astype(u2))


def to_f16(x: Vector) -> Vector:
    with np.errstate(over="ignore"):
        halves = x.astype(f2).view(u2)
    return np.where(np.isnan(x), u2(0x7FFF), halves)


def from_bf16(x: Vector) -> Vector:
    return (x.astype(u4) << u4(16)).view(f4)


_F16_VALUES = np.arange(1 << 16, dtype=u2).view(f2).astype(f4)


def from_f16(x: Vector) -> Vector:
    return _F16_VALUES[x]


def to_int(x: Vector, dtype: Any, rounding: Any) -> Vector:
    """Saturating; NaN becomes 0."""
    rounded, limits = rounding(x.astype(f8)), np.iinfo(dtype)
    low, high = rounded <= float(limits.min), rounded >= float(limits.max)
    inside = np.where(low | high | np.isnan(rounded), 0.0, rounded).astype(dtype)
    return np.where(low, dtype(limits.min), np.where(high, dtype(limits.max), inside))


# Tensor cores. In a warp, g = lane / 4 and t = lane % 4; fragments as in the ISA's figures.


def mma_m16n8k16(a: list[Vector], b: list[Vector], c: list[Vector], widen: Any) -> list[Vector]:
    """a: 4 and b: 2 vectors of uint32, two numbers each, the first in the lower half; c: 4 of
    float32. The lanes are those of whole warps. Returns 4 vectors of float32.
    """
    warps = len(a[0]) // 32

    def numbers(registers: list[Vector]) -> Vector:
        return widen(np.stack(registers, 1).view(u2).ravel()).astype(f8)

    # warp, g, t, half of the 16 columns, half of the 16 rows, one of two neighbours
    a_W16x16 = numbers(a).reshape(warps, 8, 4, 2, 2, 2)
    a_W16x16 = a_W16x16.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, 16)
    # warp, g, t, half of the 16 rows, one of two neighbours; g is the column
    b_W16x8 = numbers(b).reshape(warps, 8, 4, 2, 2).transpose(0, 3, 2, 4, 1).reshape(warps, 16, 8)
    # warp, g, t, half of the 16 rows, one of two neighbours
    c_W16x8 = np.stack(c, 1).reshape(warps, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4)
    d_W16x8 = (a_W16x16 @ b_W16x8 + c_W16x8.reshape(warps, 16, 8)).astype(f4)
    d = d_W16x8.reshape(warps, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(warps * 32, 4)
    return list(np.ascontiguousarray(d.T))


def ldmatrix_fragments(rows: Vector, transposed: bool) -> list[Vector]:
    """rows: uint16 [warp, matrix, 8, 8]. One vector of uint32 over all lanes for each matrix."""
    warps, matrices = rows.shape[:2]
    if transposed:
        rows = rows.transpose(0, 1, 3, 2)
    # lane 4 row + t holds columns 2 t and 2 t + 1
    lanes = np.ascontiguousarray(rows).view(u4).reshape(warps, matrices, 32)
    return [np.ascontiguousarray(lanes[:, i]).ravel() for i in range(matrices)]
