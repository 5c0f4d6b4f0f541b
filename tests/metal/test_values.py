"""Values of single expressions: what Metal's functions and conversions give, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from . import emulator, toolchain

#: Declarations the expressions use.
NAMES = """
  const float4 a(1, 2, 3, 4), b(0, 3, 2, 5);
  const uint4 u(0x1234ABCD, 5 << 16, 3, 4);
  const int seven = 7;
  float2 one(1, 2), two(3, 4);
  float2x2 m(1, 2, 3, 4);
  float3 whole;
  int2 exponents;
  const auto more = a > b;
"""
#: Expression: value.
VALUES = {
    # A comparison of vectors is a vector of bool: true is 1.
    "(a > b).x + (a > b).y": 1,
    "(a > b)[2]": 1,
    "more.x": 1,
    "uint(more.x)": 1,
    "float4(a > b).z": 1,
    "float4(!(a > b)).y": 1,
    "int4((a > b) && (a > 1.0f)).z": 1,
    "float4((a > b) & (a > 1.0f)).z": 1,
    "(!(a > b)).y": 1,
    "((a > b) | (a < b)).w": 1,
    "(more & (a > 1.0f)).x ? 2 : 3": 3,
    "any(bool4(true) ^ (a > b)) ? 2 : 3": 2,
    "((float4)(a >= b)).x": 1,
    "float(seven > 3)": 1,
    # Two > in a row are a shift.
    "ushort4(u >> 16).x": 0x1234,
    "float4(u >> 16).y": 5,
    "((uint4)(u >> seven)).x": 0x1234ABCD >> 7,
    "(u >> 8).w + (u >> 2).w": 1,
    "uint4((u >> 16) & (u >> 17)).x": 0x1234 & (0x1234 >> 1),
    "float4((u >> 2) > 0).w": 1,
    "half(u.z >> 1)": 1,
    # Several declarators; matrices.
    "one.y + two.x": 5,
    "(-m)[1][0]": -3,
    "determinant(m)": -2,
    "determinant(float3x3(float3(2, 0, 1), float3(0, 3, 0), float3(1, 0, 4)))": 21,
    "determinant(float4x4(2))": 16,
    "determinant(half2x2(half(3)))": 9,
    # Functions on vectors of what is known of scalars.
    "modf(float3(1.5f, -2.75f, 3), whole).y": -0.75,
    "(modf(float3(1.5f, -2.75f, 3), whole), whole.y)": -2,
    "frexp(float2(12, 0.5f), exponents).x": 0.75,
    "(frexp(float2(12, 0.5f), exponents), exponents.x)": 4,
    "ldexp(float2(1, 3), int2(2, -1)).y": 1.5,
    "ilogb(float2(12, 1)).x": 3,
    # Geometry.
    "reflect(float2(1, -1), float2(0, 1)).y": 1,
    "faceforward(float2(0, 1), float2(0, 1), float2(0, 1)).y": -1,
    "refract(float2(0, -1), float2(0, 1), 0.5f).y": -1,
    "refract(float2(1, 0), float2(0, 1), 2.0f).x": 0,
    # Integers that saturate.
    "madsat(30000, 80000, 5)": 2**31 - 1,
    "madsat(-30000, 80000, 5)": -(2**31),
    "madsat(uchar(20), uchar(20), uchar(1))": 255,
    "madsat(uint3(2), uint3(3), uint3(4)).z": 10,
    "madsat(ulong(1) << 63, ulong(2), ulong(1)) == ~ulong(0)": 1,
    "madsat(long(-1) << 62, long(4), long(1)) == long(1) << 63": 1,
    # Packing.
    "pack_half_to_snorm2x16(half2(1, -1)) == 0x80017FFFu": 1,
    "pack_half_to_unorm4x8(half4(0, 1, 0, 1)) == 0xFF00FF00u": 1,
    "unpack_unorm2x16_to_half(0xFFFF0000u).y": 1,
    "unpack_snorm2x16_to_half(0x80017FFFu).y": -1,
    # Types that public code names.
    "vec_elements<half3>::value": 3,
    "vec_elements<float>::value": 0,
    "numeric_limits<Indexed<float>>::lowest().value < -1e38f": 1,
    "numeric_limits<Indexed<int>>::max().index": 9,
    "__is_valid_simdgroup_type<ushort2>::value": 1,
    "__is_valid_simdgroup_type<long>::value": 0,
}
SOURCE = """#include <metal_stdlib>
using namespace metal;
template <typename T>
struct Indexed {
  uint index;
  T value;
};
template <typename T>
struct _numeric_limits_impl<Indexed<T>> {
  static constexpr Indexed<T> lowest() { return {0, numeric_limits<T>::lowest()}; }
  static constexpr Indexed<T> max() { return {9, numeric_limits<T>::max()}; }
};
"""


@pytest.mark.parametrize("mode", ["fast", pytest.param("race", marks=pytest.mark.slow)])
def test_values(mode: str) -> None:
    lines = "".join(f"  y[{i}] = float({e});\n" for i, e in enumerate(VALUES))
    source = f"{SOURCE}kernel void values(device float* y [[buffer(0)]]) {{{NAMES}{lines}}}\n"
    y = np.zeros(len(VALUES), np.float32)
    emulator.load(toolchain.flatten_text(source, "values.metal"), mode).launch("values", 1, 1, [y])
    found = dict(zip(VALUES, y.tolist(), strict=True))
    assert found == {e: float(np.float32(v)) for e, v in VALUES.items()}
