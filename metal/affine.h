// Affine int8/int4/int2: x ~ code * scale + bias per group (reference._encode_affine).
#pragma once

#include "common.h"

struct Affine {
  static void encode(thread float* x, thread const Place& at, thread const Target& out, int bits,
                     int group, threadgroup float*) {
    const float levels = float((1 << bits) - 1);
    const float limit = out.scale_dtype == KVQ_FLOAT16 ? KVQ_F16_MAX : KVQ_LIMIT;
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if (256 * pass >= at.dim) continue;
      thread float* v = x + 8 * pass;
      float low = v[0], high = v[0];
      KVQ_UNROLL for (int i = 1; i < 8; ++i) {
        low = min(low, v[i]);
        high = max(high, v[i]);
      }
      if (may_be_special(v) || low < -limit || high > limit) {
        low = limit;
        high = -limit;
        bool is_bad = false;
        KVQ_UNROLL for (int i = 0; i < 8; ++i) {
          v[i] = bound(v[i], limit);
          is_bad = is_bad || is_nan(v[i]);
          low = v[i] < low ? v[i] : low;
          high = v[i] > high ? v[i] : high;
        }
        high = is_bad ? INFINITY : high;  // tells the group of a NaN
      }
      low = group_min(low, group / 8);
      high = group_max(high, group / 8);
      const bool has_nan = high > limit;
      const float bias = round_scale(has_nan ? NAN : (low == 0.0f ? 0.0f : low), out.scale_dtype);
      float scale = round_scale(has_nan ? NAN : (high - low) / levels, out.scale_dtype);
      scale = scale == 0.0f ? 1.0f : scale;
      uint codes[8];
      if (is_plain_divisor(scale)) {
        const float inverse = 1.0f / scale;
        KVQ_UNROLL for (int i = 0; i < 8; ++i) {
          const float code = quotient(v[i] - bias, scale, inverse) + 0.5f;
          codes[i] = uint(min(max(code, 0.0f), levels));
        }
      } else {
        KVQ_UNROLL for (int i = 0; i < 8; ++i) {
          const float code = (v[i] - bias) / scale + 0.5f;
          codes[i] = has_nan ? 0u : uint(min(max(code, 0.0f), levels));
        }
      }
      if (!at.holds(pass)) continue;
      const int first = at.first + 256 * pass;
      store_bytes(out.codes + first / 8 * bits, bits, alignment(bits, at.wide), pack8(codes, bits));
      if (first % group == 0) {
        store_scale(out.scales, first / group, out.scale_dtype, scale);
        store_scale(out.biases, first / group, out.scale_dtype, bias);
      }
    }
  }

  static void decode(thread const Source& in, int i, int bits, int group, bool wide,
                     thread float* y) {
    const float scale = load_float(in.scales, i / group, in.scale_dtype);
    const float bias = load_float(in.biases, i / group, in.scale_dtype);
    const uint2 codes = load_bytes(in.codes + i / 8 * bits, bits, alignment(bits, wide));
    KVQ_UNROLL for (int j = 0; j < 8; ++j) {
      const float scaled = float_of_code(code_at(codes, j, bits)) * scale;
      y[j] = scaled + bias;
    }
  }
};
