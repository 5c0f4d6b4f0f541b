// Affine int8/int4/int2: x ~ code * scale + bias per group (reference._encode_affine).
#pragma once

#include "common.h"

struct Affine : NoTable {
  /// One pass of `encode` for values and scales of any kind.
  static void encode_any(thread float* v, thread const Place& at, int pass,
                         thread const Target& out, int bits, int group) {
    const float levels = float((1 << bits) - 1);
    const float limit = out.scale_dtype == KVQ_FLOAT16 ? KVQ_F16_MAX : KVQ_LIMIT;
    float low = limit, high = -limit;
    bool is_bad = false;
    KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
      v[i] = bound(v[i], limit);
      is_bad = is_bad || is_nan(v[i]);
      low = v[i] < low ? v[i] : low;
      high = v[i] > high ? v[i] : high;
    }
    high = is_bad ? INFINITY : high;  // tells the group of a NaN
    low = group_min(low, group / KVQ_WIDTH);
    high = group_max(high, group / KVQ_WIDTH);
    const bool has_nan = high > limit;
    const float bias = round_scale(has_nan ? NAN : (low == 0.0f ? 0.0f : low), out.scale_dtype);
    float scale = round_scale(has_nan ? NAN : (high - low) / levels, out.scale_dtype);
    scale = scale == 0.0f ? 1.0f : scale;
    const Divisor by = divisor_of(scale, out.scale_dtype, 8.470329472543003e-22f);  // 2^-70
    float codes[KVQ_WIDTH];
    KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) codes[i] = by.divide(v[i] - bias) + 0.5f;
    KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
      codes[i] = has_nan ? 0.0f : float(uint(min(max(codes[i], 0.0f), levels)));
    }
    store(codes, scale, bias, at, pass, out, bits, group);
  }

  static void store(thread const float* codes, float scale, float bias, thread const Place& at,
                    int pass, thread const Target& out, int bits, int group) {
    Pieces pieces;
    KVQ_UNROLL for (int half_of = 0; half_of < 2; ++half_of) {
      pieces.piece[half_of] = pack8(codes + 8 * half_of, bits);
    }
    pieces = exchanged(pieces, at, bits);
    if (!at.packs(pass)) return;
    const int first = at.sixteen(pass);
    store_codes(out.codes + first / 8 * bits, bits, true, alignment(bits, at.wide), pieces);
    if (first % group == 0) {
      store_scale(out.scales, first / group, out.scale_dtype, scale);
      store_scale(out.biases, first / group, out.scale_dtype, bias);
    }
  }

  /// The nearest whole number to x times the inverse of the scale is the code, unless the quotient
  /// lies so near the middle of two, or of the range, that roundings decide: then, and where a
  /// value is NaN, the simdgroup starts over.
  static void encode(thread float* x, thread const Place& at, thread const Target& out, int bits,
                     int group, threadgroup float*) {
    const float levels = float((1 << bits) - 1);
    const float limit = out.scale_dtype == KVQ_FLOAT16 ? KVQ_F16_MAX : KVQ_LIMIT;
    // Above the error of the division and of adding 0.5, each half a unit in the last place.
    const float middle = 0.5f - levels * 1.5e-7f;
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if (KVQ_SPAN * pass >= at.dim) continue;
      thread float* v = x + KVQ_WIDTH * pass;
      const float low = group_min(lane_min(v), group / KVQ_WIDTH);
      const float high = group_max(lane_max(v), group / KVQ_WIDTH);
      const float bias = round_scale(low == 0.0f ? 0.0f : low, out.scale_dtype);
      float scale = round_scale(quotient(high - low, levels, 1.0f / levels, true), out.scale_dtype);
      scale = scale == 0.0f ? 1.0f : scale;
      const float inverse = 1.0f / scale, most = middle * scale;
      bool is_plain = is_plain_divisor(scale) && low >= -limit && high <= limit &&
                      low - bias >= -most && high - bias <= levels * scale + most;
      float codes[KVQ_WIDTH];
      KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
        const float value = v[i] - bias;
        codes[i] = fma(value, inverse, KVQ_MAGIC) - KVQ_MAGIC;
        is_plain = is_plain && fabs(fma(-codes[i], scale, value)) <= most;
      }
      if (simd_any(!is_plain)) {
        encode_any(v, at, pass, out, bits, group);
      } else {
        store(codes, scale, bias, at, pass, out, bits, group);
      }
    }
  }

  static Packed load(thread const Source& in, thread const Place& at, int pass, int bits,
                     int group) {
    const int first = at.sixteen(pass);
    Packed packed = nothing();
    if (at.packs(pass)) {
      packed.scale = load_float(in.scales, first / group, in.scale_dtype);
      packed.bias = load_float(in.biases, first / group, in.scale_dtype);
      packed.codes = load_codes(in.codes + first / 8 * bits, bits, true, alignment(bits, at.wide));
    }
    return packed;
  }

  static void decode(thread const Packed& packed, thread const Place& at, int bits,
                     thread float* y) {
    const Pieces codes = exchanged(packed.codes, at, bits);
    KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
      const float scaled = float_of_code(codes.piece[i / 8], i % 8, bits) * packed.scale;
      y[i] = scaled + packed.bias;
    }
  }
};
