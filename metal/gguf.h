// GGUF q8_0 and q4_0 blocks of 32: bytes equal to the gguf package's quantize
// (reference._encode_gguf). A block starts with its float16 scale, at any byte address.
#pragma once

#include "common.h"

inline void store_block_scale(device uchar* block, float d) {
  const float rounded = round_scale(d, KVQ_FLOAT16);
  const uint u = is_nan(rounded) ? 0x7e00u : uint(as_type<ushort>(half(rounded)));
  block[0] = uchar(u & 0xffu);
  block[1] = uchar(u >> 8);
}

inline float load_block_scale(const device uchar* block) {
  return float(as_type<half>(ushort(uint(block[0]) | (uint(block[1]) << 8))));
}

/// Blocks whose codes are zero bytes: with a NaN, or a scale so small that 1 / d overflows.
inline bool is_blank(bool has_nan, float inverse) {
  return has_nan || (as_type<uint>(inverse) & 0x7fffffffu) == 0x7f800000u;
}

struct Q8_0 {
  static void encode(threadgroup float* row, uint lane, int n, thread const Target& out, int, int) {
    for (int b = 0; b < n / 32; ++b) {
      const float v = bound(row[b * 32 + int(lane)], KVQ_LIMIT);
      const bool has_nan = simd_max(int(is_nan(v))) != 0;
      const float largest = simd_max(is_nan(v) ? 0.0f : fabs(v));
      const float d = has_nan ? NAN : largest / 127.0f;
      const float inverse = d == 0.0f ? 0.0f : 1.0f / d;
      const float scaled = v * inverse;
      const float magnitude = fabs(scaled);
      const float whole = floor(magnitude);
      const float rounded = whole + floor(2.0f * (magnitude - whole));  // half away from zero
      const int code = rounded > 0.0f && !is_blank(has_nan, inverse) ? int(rounded) : 0;
      device uchar* block = out.codes + b * 34;
      block[2 + lane] = uchar((scaled < 0.0f ? -code : code) & 0xff);
      if (lane == 0) {
        store_block_scale(block, d);
      }
    }
  }

  static void decode(thread const Source& in, int i, int, int, thread float* y) {
    const device uchar* block = in.codes + i / 32 * 34;
    const float d = load_block_scale(block);
    for (int j = 0; j < 4; ++j) {
      y[j] = float(as_type<char>(block[2 + i % 32 + j])) * d;
    }
  }
};

struct Q4_0 {
  static void encode(threadgroup float* row, uint lane, int n, thread const Target& out, int, int) {
    for (int b = 0; b < n / 32; ++b) {
      const float v = bound(row[b * 32 + int(lane)], KVQ_LIMIT);
      const bool has_nan = simd_max(int(is_nan(v))) != 0;
      const float magnitude = is_nan(v) ? 0.0f : fabs(v);
      const float largest = simd_max(magnitude);
      const int first = simd_min(magnitude == largest ? int(lane) : 32);
      const float peak = simd_shuffle(v, ushort(first));
      const float d = has_nan ? NAN : peak / -8.0f;
      const float inverse = d == 0.0f ? 0.0f : 1.0f / d;
      const float scaled = v * inverse;  // rounded before the sum, as ggml's is
      float code = trunc(scaled + 8.5f);
      code = code > 0.0f && !is_blank(has_nan, inverse) ? (code > 15.0f ? 15.0f : code) : 0.0f;
      const uint low = uint(code), high = simd_shuffle_xor(low, ushort(16));
      device uchar* block = out.codes + b * 18;
      if (lane < 16) {
        block[2 + lane] = uchar(low | (high << 4));
      }
      if (lane == 0) {
        store_block_scale(block, d);
      }
    }
  }

  static void decode(thread const Source& in, int i, int, int, thread float* y) {
    const device uchar* block = in.codes + i / 32 * 18;
    const float d = load_block_scale(block);
    for (int j = 0; j < 4; ++j) {
      const uint pair = block[2 + i % 16 + j];
      y[j] = float(int(i % 32 < 16 ? pair & 15u : pair >> 4) - 8) * d;
    }
  }
};
