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

  static void encode(thread float* x, thread const Place& at, thread const Target& out, int,
                     int group, threadgroup float*) {
    const float most = Bias == 7 ? 448.0f : 57344.0f;
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if (256 * pass >= at.dim) continue;
      thread float* v = x + 8 * pass;
      float largest = 0.0f;
      KVQ_UNROLL for (int i = 0; i < 8; ++i) largest = max(largest, fabs(v[i]));
      if (may_be_special(v) || largest > KVQ_LIMIT) {
        largest = 0.0f;
        bool is_bad = false;
        KVQ_UNROLL for (int i = 0; i < 8; ++i) {
          v[i] = bound(v[i], KVQ_LIMIT);
          is_bad = is_bad || is_nan(v[i]);
          largest = fabs(v[i]) > largest ? fabs(v[i]) : largest;
        }
        largest = is_bad ? INFINITY : largest;  // tells the group of a NaN
      }
      largest = group_max(largest, group / 8);
      const bool has_nan = largest > KVQ_LIMIT;
      float scale = round_scale(has_nan ? NAN : largest / most, out.scale_dtype);
      scale = scale == 0.0f ? 1.0f : scale;
      uint codes[8];
      if (is_plain_divisor(scale)) {
        const float inverse = 1.0f / scale;
        KVQ_UNROLL for (int i = 0; i < 8; ++i) {
          const float scaled = min(quotient(fabs(v[i]), scale, inverse), most);
          codes[i] = code_of(scaled) | ((as_type<uint>(v[i]) >> 24) & 0x80u);
        }
      } else {
        KVQ_UNROLL for (int i = 0; i < 8; ++i) {
          codes[i] = has_nan ? 0u : code_of(bound(v[i] / scale, most));
        }
      }
      if (!at.holds(pass)) continue;
      const int first = at.first + 256 * pass;
      store_bytes(out.codes + first, 8, alignment(8, at.wide), pack8(codes, 8));
      if (first % group == 0) store_scale(out.scales, first / group, out.scale_dtype, scale);
    }
  }

  static void decode(thread const Source& in, int i, int, int group, bool wide, thread float* y) {
    const float scale = load_float(in.scales, i / group, in.scale_dtype);
    const uint2 codes = load_bytes(in.codes + i, 8, alignment(8, wide));
    KVQ_UNROLL for (int j = 0; j < 8; ++j) y[j] = value_of(code_at(codes, j, 8)) * scale;
  }
};

typedef Fp8<3, 7> Fp8E4M3;
typedef Fp8<2, 15> Fp8E5M2;
