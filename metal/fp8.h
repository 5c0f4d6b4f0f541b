// fp8 e4m3 and e5m2 with one scale per group (reference._encode_fp8). Codes equal torch's casts.
#pragma once

#include "common.h"

template <int Mantissa, int Bias>
struct Fp8 {
  /// |x| <= the largest value. Rounds to nearest even, with subnormals.
  static uint code_of(float x) {
    const int shift = 23 - Mantissa;
    const uint rebias = uint(127 - Bias) << 23;
    // Adding this float aligns its last bit with the smallest subnormal, and so rounds there.
    const uint align = uint(127 + 1 - Bias + shift) << 23;
    const uint u = as_type<uint>(x), magnitude = u & 0x7fffffffu;
    const uint odd = (magnitude >> shift) & 1u;
    const uint normal = (magnitude - rebias + ((1u << (shift - 1)) - 1u) + odd) >> shift;
    const uint subnormal = as_type<uint>(as_type<float>(magnitude) + as_type<float>(align)) - align;
    return ((u >> 24) & 0x80u) | (magnitude < rebias + (1u << 23) ? subnormal : normal);
  }

  /// Through half, whose exponent has at least as many bits; what torch reads as NaN is NaN.
  static float value_of(uint code) {
    const uint magnitude = code & 0x7fu, sign = (code & 0x80u) << 8;
    if (Bias == 7 && magnitude == 0x7fu) {
      return NAN;
    }
    const half aligned = as_type<half>(ushort(sign | (magnitude << (10 - Mantissa))));
    return float(aligned) * float(1 << (15 - Bias));
  }

  static void encode(threadgroup float* row, uint lane, int n, thread const Target& out, int,
                     int group) {
    const float most = Bias == 7 ? 448.0f : 57344.0f;
    for (int g = 0; g < n / group; ++g) {
      const int begin = g * group + int(lane), end = (g + 1) * group;
      float largest = 0.0f;
      int has_nan = 0;
      for (int i = begin; i < end; i += 32) {
        const float v = bound(row[i], KVQ_LIMIT);
        has_nan |= int(is_nan(v));
        largest = fabs(v) > largest ? fabs(v) : largest;
        row[i] = v;
      }
      largest = simd_max(largest);
      has_nan = simd_max(has_nan);
      float scale = round_scale(has_nan ? NAN : largest / most, out.scale_dtype);
      scale = scale == 0.0f ? 1.0f : scale;
      for (int i = begin; i < end; i += 32) {
        const float scaled = bound(row[i] / scale, most);
        out.codes[i] = uchar(has_nan ? 0u : code_of(scaled));
      }
      if (lane == 0) {
        store_scale(out.scales, g, out.scale_dtype, scale);
      }
    }
  }

  static void decode(thread const Source& in, int i, int, int group, thread float* y) {
    const float scale = load_float(in.scales, i / group, in.scale_dtype);
    for (int j = 0; j < 4; ++j) {
      y[j] = value_of(in.codes[i + j]) * scale;
    }
  }
};

typedef Fp8<3, 7> Fp8E4M3;
typedef Fp8<2, 15> Fp8E5M2;
