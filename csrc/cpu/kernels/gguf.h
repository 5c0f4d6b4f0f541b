// GGUF q8_0 and q4_0 blocks of 32: bytes equal to the gguf package's quants.quantize
// (reference._encode_gguf).
#pragma once

#include <cmath>
#include <cstdint>

#include "convert.h"
#include "lanes.h"

namespace kvq::cpu::KVQ_ISA {

constexpr int kBlock = 32;

inline void store_half(uint8_t* p, float x) {
  store_scale(reinterpret_cast<char*>(p), 0, KVQ_FLOAT16, x);
}

inline float load_half(const uint8_t* p) {
  return load_scale(reinterpret_cast<const char*>(p), 0, KVQ_FLOAT16);
}

inline void encode_q8_0(float* y, const Layout& layout, uint8_t* codes) {
  for (int64_t b = 0; b < layout.head_dim / kBlock; ++b, y += kBlock, codes += 2 + kBlock) {
    const GroupRange range = clamp_group(y, kBlock, KVQ_LIMIT);
    if (range.nan) {
      store_half(codes, NAN);
      std::memset(codes + 2, 0, kBlock);
      continue;
    }
    const float d = magnitude(range) / 127;
    const float inverse = d == 0 ? 0.0f : 1 / d;
    store_half(codes, d);
    if (std::isinf(inverse)) {  // d < 2^-128 is stored as 0
      std::memset(codes + 2, 0, kBlock);
      continue;
    }
    for (int i = 0; i < kBlock; ++i) {
      const float scaled = y[i] * inverse;
      const float magnitude = std::fabs(scaled);
      const float whole = std::floor(magnitude);
      const int q = static_cast<int>(whole + std::floor(2 * (magnitude - whole)));
      codes[2 + i] = static_cast<uint8_t>(scaled < 0 ? -q : q);
    }
  }
}

/// The first element of this magnitude, with its sign: where two tie, ggml takes the first.
inline float first_of_magnitude(const float* y, float size) {
  int i = 0;
  while (std::fabs(y[i]) != size) ++i;
  return y[i];
}

inline void encode_q4_0(float* y, const Layout& layout, uint8_t* codes) {
  for (int64_t b = 0; b < layout.head_dim / kBlock; ++b, y += kBlock, codes += 2 + kBlock / 2) {
    const GroupRange range = clamp_group(y, kBlock, KVQ_LIMIT);
    if (range.nan) {
      store_half(codes, NAN);
      std::memset(codes + 2, 0, kBlock / 2);
      continue;
    }
    const float d = first_of_magnitude(y, magnitude(range)) / -8;
    const float inverse = d == 0 ? 0.0f : 1 / d;
    store_half(codes, d);
    if (std::isinf(inverse)) {  // d < 2^-128 is stored as 0
      std::memset(codes + 2, 0, kBlock / 2);
      continue;
    }
    uint8_t q[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      const int v = static_cast<int>(y[i] * inverse + 8.5f);  // two float32 roundings, as ggml's
      q[i] = static_cast<uint8_t>(v < 0 ? 0 : v > 15 ? 15 : v);
    }
    for (int i = 0; i < kBlock / 2; ++i) codes[2 + i] = q[i] | q[i + kBlock / 2] << 4;
  }
}

inline void decode_q8_0(const uint8_t* codes, const Layout& layout, float* y) {
  for (int64_t b = 0; b < layout.head_dim / kBlock; ++b, y += kBlock, codes += 2 + kBlock) {
    const float d = load_half(codes);
    for (int i = 0; i < kBlock; ++i)
      y[i] = static_cast<float>(static_cast<int8_t>(codes[2 + i])) * d;
  }
}

inline void decode_q4_0(const uint8_t* codes, const Layout& layout, float* y) {
  for (int64_t b = 0; b < layout.head_dim / kBlock; ++b, y += kBlock, codes += 2 + kBlock / 2) {
    const float d = load_half(codes);
    for (int i = 0; i < kBlock / 2; ++i) {
      y[i] = static_cast<float>((codes[2 + i] & 15) - 8) * d;
      y[i + kBlock / 2] = static_cast<float>((codes[2 + i] >> 4) - 8) * d;
    }
  }
}

}  // namespace kvq::cpu::KVQ_ISA
