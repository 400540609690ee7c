"""What the PTX interpreter computes (ptx/arithmetic.py) against slow formulas from the ISA."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from ptx import arithmetic
from ptx.arithmetic import f2, f4, i4, i8, u1, u2, u4, u8

RANDOM = np.random.default_rng(0)
COUNT = 3000


def words(count: int = COUNT, dtype: Any = u4) -> Any:
    bits = 8 * np.dtype(dtype).itemsize
    some = RANDOM.integers(0, 1 << 63, count).astype(u8) ^ u8(1 << 63) * RANDOM.integers(
        0, 2, count
    ).astype(u8)
    return (some >> u8(64 - bits)).astype(dtype)


def fragments(a: Any, b: Any, c: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Of matrices [warp, row, column], as the ISA's figures spread them over lanes."""
    warps = len(a)
    a_lanes, b_lanes = np.zeros((32 * warps, 8), u2), np.zeros((32 * warps, 4), u2)
    c_lanes = np.zeros((32 * warps, 4), f4)
    for warp in range(warps):
        for lane in range(32):
            g, t, at = lane // 4, lane % 4, 32 * warp + lane
            for i in range(8):
                row = g if i < 2 or 4 <= i < 6 else g + 8
                a_lanes[at, i] = a[warp, row, 2 * t + i % 2 + (8 if i >= 4 else 0)]
            for i in range(4):
                b_lanes[at, i] = b[warp, 2 * t + i % 2 + (8 if i >= 2 else 0), g]
                c_lanes[at, i] = c[warp, g if i < 2 else g + 8, 2 * t + i % 2]
    pairs = (list(np.ascontiguousarray(x.view(u4).T)) for x in (a_lanes, b_lanes))
    return *pairs, list(np.ascontiguousarray(c_lanes.T))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mma(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (
        torch.randn(3, *shape, generator=generator).to(dtype)
        for shape in ((16, 16), (16, 8), (16, 8))
    )
    bits = [x.view(torch.uint16).numpy() for x in (a, b)]
    widen = arithmetic.from_bf16 if dtype == torch.bfloat16 else arithmetic.from_f16
    lanes = fragments(*bits, c.float().numpy())
    found = arithmetic.mma_m16n8k16(*lanes, widen)
    right = (a.double() @ b.double() + c.double()).float().numpy()
    for at in range(96):
        warp, g, t = at // 32, at % 32 // 4, at % 4
        for i in range(4):
            assert found[i][at] == right[warp, g if i < 2 else g + 8, 2 * t + i % 2]


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "trans"])
def test_ldmatrix(transposed: bool) -> None:
    rows = words(2 * 4 * 64, u2).reshape(2, 4, 8, 8)
    found = arithmetic.ldmatrix_fragments(rows, transposed)
    for warp in range(2):
        for matrix in range(4):
            for lane in range(32):
                row, column = lane // 4, lane % 4 * 2
                pair = [
                    int(
                        rows[
                            (
                                warp,
                                matrix,
                                *((column + e, row) if transposed else (row, column + e)),
                            )
                        ]
                    )
                    for e in (0, 1)
                ]
                assert found[matrix][32 * warp + lane] == pair[0] | pair[1] << 16


def nearest(x: Fraction, found: Any) -> bool:
    """Whether no float32 lies nearer to x."""
    error = abs(Fraction(float(found)) - x)
    sides = (np.nextafter(found, f4(side)) for side in (-np.inf, np.inf))
    return all(error <= abs(Fraction(float(other)) - x) for other in sides)


def test_fma_rounds_once() -> None:
    a, b = (RANDOM.standard_normal(COUNT).astype(f4) for _ in range(2))
    product = a.astype(float) * b
    cancels = -product * (1 + RANDOM.integers(-9, 9, COUNT) * 2.0**-24)
    other = RANDOM.standard_normal(COUNT) * 2.0 ** RANDOM.integers(-60, 30, COUNT)
    c = np.where(RANDOM.random(COUNT) < 0.5, cancels, other).astype(f4)
    c[:100] = product[:100].astype(f4) * f4(2.0**25)  # the product is about half a unit of c
    found = arithmetic.fma(a, b, c)
    for x, y, z, one in zip(a, b, c, found, strict=True):
        assert nearest(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), one)


def test_fma_where_float64_lies_halfway() -> None:
    """1 + 2**-24 + 2**-70: float64 loses the last part, and half a unit would go to even."""
    a, b = f4(2.0**-35), f4(2.0**-35)
    c = f4(1.0)
    one = np.array([a, -a], f4)
    product = arithmetic.fma(one, np.array([b, b]), np.array([c, c]))
    assert product.tolist() == [1.0, 1.0]
    x = f4(1 + 2.0**-12)  # squared: 1 + 2**-11 + 2**-24
    found = arithmetic.fma(
        np.array([x, x]), np.array([x, x]), np.array([2.0**-80, -(2.0**-80)], f4)
    )
    assert found.tolist() == [1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-11]


def test_fields_of_bits() -> None:
    a, b, c = words(), words(), words()
    start, length = (RANDOM.integers(0, 35, COUNT).astype(u4) for _ in range(2))
    inserted = arithmetic.bfi(a, b, start, length)
    unsigned = arithmetic.bfe(a, start, length)
    signed = arithmetic.bfe(a.view(i4), start, length).view(u4)
    permuted = arithmetic.prmt(a, b, c)
    tables = {table: arithmetic.lop3(a, b, c, table) for table in (0x80, 0xFE, 0x96, 0xE8, 0x1A)}
    for i in range(COUNT):
        x, y, z, p, n = (int(v[i]) for v in (a, b, c, start, length))
        into = y
        for j in range(min(n, 32)):
            if p + j <= 31:
                into = into & ~(1 << p + j) | ((x >> j & 1) << p + j)
        assert inserted[i] == into
        sign = x >> min(p + n - 1, 31) & 1 if n else 0
        bits = [x >> p + j & 1 if j < n and p + j <= 31 else None for j in range(32)]
        assert unsigned[i] == sum((bit or 0) << j for j, bit in enumerate(bits))
        assert signed[i] == sum((sign if bit is None else bit) << j for j, bit in enumerate(bits))
        byte = struct.pack("<II", x, y)
        chosen = [z >> 4 * j & 15 for j in range(4)]
        right = [byte[s & 7] if s < 8 else 255 * (byte[s & 7] >> 7) for s in chosen]
        assert permuted[i] == int.from_bytes(bytes(right), "little")
        for table, found in tables.items():
            each = [(x >> j & 1) << 2 | (y >> j & 1) << 1 | (z >> j & 1) for j in range(32)]
            assert found[i] == sum((table >> bit & 1) << j for j, bit in enumerate(each))


def test_counting_bits() -> None:
    a = np.concatenate(
        [words() >> RANDOM.integers(0, 32, COUNT).astype(u4), np.array([0, 1, 2**32 - 1], u4)]
    )
    assert arithmetic.clz(a).tolist() == [32 - int(x).bit_length() for x in a]
    assert arithmetic.brev(a).tolist() == [int(f"{x:032b}"[::-1], 2) for x in a.tolist()]


def test_shifts() -> None:
    for dtype in (u2, u4, u8, i4, i8):
        a, width = words(dtype=dtype), 8 * np.dtype(dtype).itemsize
        amount = RANDOM.integers(0, width + 5, COUNT).astype(u4)
        right = [int(x) >> int(n) for x, n in zip(a, amount, strict=True)]
        assert arithmetic.shr(a, amount).tolist() == right
        if np.dtype(dtype).kind == "u":
            left = [int(x) << int(n) & (1 << width) - 1 for x, n in zip(a, amount, strict=True)]
            assert arithmetic.shl(a, amount).tolist() == left
    low, high, amount = words(), words(), RANDOM.integers(0, 70, COUNT).astype(u4)
    for left, wrap in ((left, wrap) for left in (False, True) for wrap in (False, True)):
        found = arithmetic.shf(low, high, amount, left=left, wrap=wrap)
        for x, y, n, one in zip(low.tolist(), high.tolist(), amount.tolist(), found, strict=True):
            by, both = n % 32 if wrap else min(n, 32), y << 32 | x
            assert one == (both << by >> 32 if left else both >> by) & 0xFFFFFFFF


def test_products_and_quotients() -> None:
    for dtype in (u4, i4, u8, i8):
        a, b, bits = words(dtype=dtype), words(dtype=dtype), 8 * np.dtype(dtype).itemsize
        b[:500] >>= dtype(bits // 2)
        b[b == 0] = 1
        pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
        assert arithmetic.mul_hi(a, b).tolist() == [x * y >> bits for x, y in pairs]
        quotients = [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in pairs]
        assert arithmetic.div(a, b).tolist() == quotients
        rests = [x - q * y for (x, y), q in zip(pairs, quotients, strict=True)]
        assert arithmetic.rem(a, b).tolist() == rests


def test_largest_and_smallest() -> None:
    nan = math.nan
    a, b = np.array([nan, 1, -0.0, 0.0, nan], f4), np.array([2, nan, 0.0, -0.0, nan], f4)
    most, least = arithmetic.fmax(a, b).view(u4), arithmetic.fmin(a, b).view(u4)
    assert most[:4].tolist() == np.array([2, 1, 0, 0], f4).view(u4).tolist()
    assert least[:4].tolist() == np.array([2, 1, -0.0, -0.0], f4).view(u4).tolist()
    assert most[4] == least[4] == 0x7FFFFFFF


def test_roundings() -> None:
    x = words().view(f4)
    x = np.concatenate(
        [
            x,
            (x.view(u4) & u4(0xFFFF0000) | u4(0x8000)).view(f4),
            words(dtype=u2).view(f2).astype(f4),
        ]
    )
    x = x[np.isfinite(x)]
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        right = torch.from_numpy(x).to(dtype).view(torch.uint16).numpy()
        assert (getattr(arithmetic, f"to_{name}")(x) == right).all()
        every = np.arange(1 << 16, dtype=u2)
        back = getattr(arithmetic, f"from_{name}")(every)
        numbers = torch.from_numpy(every).view(dtype).float().numpy()
        assert ((back == numbers) | np.isnan(back) & np.isnan(numbers)).all()
        assert getattr(arithmetic, f"to_{name}")(np.array([np.nan], f4)) == 0x7FFF


def test_to_integers() -> None:
    x = np.array([math.nan, math.inf, -math.inf, 1.5, -2.5, 3e9], f4)
    found = arithmetic.to_int(x, i4, np.rint).tolist()
    assert found == [0, 2**31 - 1, -(2**31), 2, -2, 2**31 - 1]
    assert arithmetic.to_int(x, u1, np.trunc).tolist() == [0, 255, 0, 1, 0, 255]


def test_subnormals_are_flushed() -> None:
    x = np.array([1e-40, -1e-40, 2.0**-126, 1.0], f4)
    assert (
        arithmetic.flush(x).view(u4).tolist()
        == np.array([0.0, -0.0, 2.0**-126, 1], f4).view(u4).tolist()
    )
