// fp8 e4m3 and e5m2 with one scale per group (reference._encode_fp8). Codes equal torch's casts.
#pragma once

#include "common.h"

template <int Mantissa, int Bias>
struct Fp8 : NoTable {
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
      if (KVQ_SPAN * pass >= at.dim) continue;
      thread float* v = x + KVQ_WIDTH * pass;
      const float largest = group_max(bounded_peak(v), group / KVQ_WIDTH);
      const bool has_nan = largest > KVQ_LIMIT;
      float scale = round_scale(has_nan ? NAN : largest / most, out.scale_dtype);
      scale = scale == 0.0f ? 1.0f : scale;
      uint codes[KVQ_WIDTH];
      if (is_plain_divisor(scale)) {
        const float inverse = 1.0f / scale;
        const bool is_short = is_short_divisor(scale);
        KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
          const float scaled = min(quotient(fabs(v[i]), scale, inverse, is_short), most);
          codes[i] = code_of(scaled) | ((as_type<uint>(v[i]) >> 24) & 0x80u);
        }
      } else {
        KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
          codes[i] = has_nan ? 0u : code_of(bound(v[i] / scale, most));
        }
      }
      Pieces pieces;
      KVQ_UNROLL for (int i = 0; i < 2; ++i) pieces.piece[i] = pack8(codes + 8 * i, 8);
      pieces = exchanged(pieces, at, 8);
      if (!at.packs(pass)) continue;
      const int first = at.sixteen(pass);
      store_codes(out.codes + first, 8, true, alignment(8, at.wide), pieces);
      if (first % group == 0) store_scale(out.scales, first / group, out.scale_dtype, scale);
    }
  }

  static Packed load(thread const Source& in, thread const Place& at, int pass, int, int group) {
    const int first = at.sixteen(pass);
    Packed packed = nothing();
    if (at.packs(pass)) {
      packed.scale = load_float(in.scales, first / group, in.scale_dtype);
      packed.codes = load_codes(in.codes + first, 8, true, alignment(8, at.wide));
    }
    return packed;
  }

  static void decode(thread const Packed& packed, thread const Place& at, int, thread float* y) {
    const Pieces codes = exchanged(packed.codes, at, 8);
    KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
      y[i] = value_of(code_at(codes.piece[i / 8], i % 8, 8)) * packed.scale;
    }
  }
};

typedef Fp8<3, 7> Fp8E4M3;
typedef Fp8<2, 15> Fp8E5M2;
