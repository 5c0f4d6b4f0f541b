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

/// Largest magnitude of a block, 4 lanes; bounds the values. Infinite where one is NaN.
inline float block_peak(thread float* v) {
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
    largest = is_bad ? INFINITY : largest;
  }
  return group_max(largest, 4);
}

struct Q8_0 {
  static void encode(thread float* x, thread const Place& at, thread const Target& out, int, int,
                     threadgroup float*) {
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if (256 * pass >= at.dim) continue;
      thread float* v = x + 8 * pass;
      const float largest = block_peak(v);
      const bool has_nan = largest > KVQ_LIMIT;
      const float d = has_nan ? NAN : largest / 127.0f;
      const float inverse = d == 0.0f ? 0.0f : 1.0f / d;
      const bool blank = is_blank(has_nan, inverse);
      uint codes[8];
      KVQ_UNROLL for (int i = 0; i < 8; ++i) {
        const float scaled = v[i] * inverse;
        // Half away from zero: the float before 0.5 is what leaves 0.49999997 at 0.
        const float rounded = fabs(scaled) + 0.49999997f;
        const int code = blank ? 0 : int(rounded);
        codes[i] = uint(scaled < 0.0f ? -code : code) & 0xffu;
      }
      if (!at.holds(pass)) continue;
      const int first = at.first + 256 * pass;
      device uchar* block = out.codes + first / 32 * 34;
      store_bytes(block + 2 + first % 32, 8, at.wide ? 2 : 1, pack8(codes, 8));
      if (first % 32 == 0) store_block_scale(block, d);
    }
  }

  static void decode(thread const Source& in, int i, int, int, bool wide, thread float* y) {
    const device uchar* block = in.codes + i / 32 * 34;
    const float d = load_block_scale(block);
    const uint2 codes = load_bytes(block + 2 + i % 32, 8, wide ? 2 : 1);
    KVQ_UNROLL for (int j = 0; j < 8; ++j) {
      const uint code = code_at(codes, j, 8) ^ 0x80u;
      y[j] = (float_of_code(code) - 128.0f) * d;
    }
  }
};

struct Q4_0 {
  static void encode(thread float* x, thread const Place& at, thread const Target& out, int, int,
                     threadgroup float*) {
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if (256 * pass >= at.dim) continue;
      thread float* v = x + 8 * pass;
      const float largest = block_peak(v);
      const bool has_nan = largest > KVQ_LIMIT;
      // The sign of the first value of that magnitude.
      int first_at = 64;
      KVQ_UNROLL for (int i = 7; i >= 0; --i) {
        const int mine = 2 * (at.first % 32 + i) + int(as_type<uint>(v[i]) >> 31);
        first_at = fabs(v[i]) == largest ? mine : first_at;
      }
      first_at = min(first_at, simd_shuffle_xor(first_at, ushort(1)));
      first_at = min(first_at, simd_shuffle_xor(first_at, ushort(2)));
      const float peak = first_at % 2 == 1 ? -largest : largest;
      const float d = has_nan ? NAN : peak / -8.0f;
      const float inverse = d == 0.0f ? 0.0f : 1.0f / d;
      const bool blank = is_blank(has_nan, inverse);
      uint2 codes = uint2(0u, 0u);  // a byte each
      KVQ_UNROLL for (int i = 0; i < 8; ++i) {
        const float scaled = v[i] * inverse;  // rounded before the sum, as ggml's is
        const uint code = blank ? 0u : uint(min(max(scaled + 8.5f, 0.0f), 15.0f));
        if (i < 4) {
          codes.x |= code << (8 * i);
        } else {
          codes.y |= code << (8 * (i - 4));
        }
      }
      // The block's second half goes into the high nibbles of the first: each of the two lanes
      // stores four bytes.
      const bool upper = at.first % 32 >= 16;
      const uint other = simd_shuffle_xor(upper ? codes.x : codes.y, ushort(2));
      const uint bytes = upper ? other | (codes.y << 4) : codes.x | (other << 4);
      if (!at.holds(pass)) continue;
      const int first = at.first + 256 * pass;
      device uchar* block = out.codes + first / 32 * 18;
      store_bytes(block + 2 + first % 16 + (upper ? 4 : 0), 4, at.wide ? 2 : 1, uint2(bytes, 0u));
      if (first % 32 == 0) store_block_scale(block, d);
    }
  }

  static void decode(thread const Source& in, int i, int, int, bool wide, thread float* y) {
    const device uchar* block = in.codes + i / 32 * 18;
    const float d = load_block_scale(block);
    const uint2 pairs = load_bytes(block + 2 + i % 16, 8, wide ? 2 : 1);
    const uint shift = i % 32 < 16 ? 0u : 4u;
    const uint2 codes = uint2(pairs.x >> shift, pairs.y >> shift) & 0x0f0f0f0fu;
    KVQ_UNROLL for (int j = 0; j < 8; ++j) {
      y[j] = (float_of_code(code_at(codes, j, 8)) - 8.0f) * d;
    }
  }
};
