// Affine int8/int4/int2: x ~ code * scale + bias per group (reference._encode_affine).
#pragma once

#include "common.h"

struct Affine {
  static void encode(threadgroup float* row, uint lane, int n, thread const Target& out, int bits,
                     int group) {
    const float levels = float((1 << bits) - 1);
    const float limit = out.scale_dtype == KVQ_FLOAT16 ? KVQ_F16_MAX : KVQ_LIMIT;
    for (int g = 0; g < n / group; ++g) {
      const int begin = g * group + int(lane), end = (g + 1) * group;
      float low = limit, high = -limit;
      int has_nan = 0;
      for (int i = begin; i < end; i += 32) {
        const float v = bound(row[i], limit);
        has_nan |= int(is_nan(v));
        low = v < low ? v : low;
        high = v > high ? v : high;
        row[i] = v;
      }
      low = simd_min(low);
      high = simd_max(high);
      has_nan = simd_max(has_nan);
      const float bias = round_scale(has_nan ? NAN : (low == 0.0f ? 0.0f : low), out.scale_dtype);
      float scale = round_scale(has_nan ? NAN : (high - low) / levels, out.scale_dtype);
      scale = scale == 0.0f ? 1.0f : scale;
      for (int i = begin; i < end; i += 32) {
        const float code = floor((row[i] - bias) / scale + 0.5f);
        row[i] = code > 0.0f && !has_nan ? (code > levels ? levels : code) : 0.0f;
      }
      if (lane == 0) {
        store_scale(out.scales, g, out.scale_dtype, scale);
        store_scale(out.biases, g, out.scale_dtype, bias);
      }
    }
    pack_row(row, lane, n, bits, out.codes);
  }

  static void decode(thread const Source& in, int i, int bits, int group, thread float* y) {
    const float scale = load_float(in.scales, i / group, in.scale_dtype);
    const float bias = load_float(in.biases, i / group, in.scale_dtype);
    const uint codes = unpack4(in.codes, i, bits);
    for (int j = 0; j < 4; ++j) {
      const float scaled = float(code_at(codes, j, bits)) * scale;
      y[j] = scaled + bias;
    }
  }
};
