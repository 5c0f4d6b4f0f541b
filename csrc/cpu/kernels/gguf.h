// GGUF q8_0 and q4_0 blocks of 32: bytes equal to the gguf package's quants.quantize
// (reference._encode_gguf).
#pragma once

#include <cmath>
#include <cstdint>

#include "convert.h"

namespace kvq::cpu::KVQ_ISA {

constexpr int kBlock = 32;

inline void store_half(uint8_t* p, float x) {
  store_scale(reinterpret_cast<char*>(p), 0, KVQ_FLOAT16, x);
}

inline float load_half(const uint8_t* p) {
  return load_scale(reinterpret_cast<const char*>(p), 0, KVQ_FLOAT16);
}

/// Clamp to what float32 arithmetic bears; true where the block holds a NaN.
inline bool clamp_block(float* y) {
  bool nan = false;
  for (int i = 0; i < kBlock; ++i) {
    float v = y[i];
    v = v > KVQ_LIMIT ? KVQ_LIMIT : v;
    v = v < -KVQ_LIMIT ? -KVQ_LIMIT : v;
    nan |= v != v;
    y[i] = v;
  }
  return nan;
}

inline void encode_q8_0(float* y, const Layout& layout, uint8_t* codes) {
  for (int64_t b = 0; b < layout.head_dim / kBlock; ++b, y += kBlock, codes += 2 + kBlock) {
    if (clamp_block(y)) {
      store_half(codes, NAN);
      std::memset(codes + 2, 0, kBlock);
      continue;
    }
    float largest = 0;
    for (int i = 0; i < kBlock; ++i)
      largest = std::fabs(y[i]) > largest ? std::fabs(y[i]) : largest;
    const float d = largest / 127;
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

inline void encode_q4_0(float* y, const Layout& layout, uint8_t* codes) {
  for (int64_t b = 0; b < layout.head_dim / kBlock; ++b, y += kBlock, codes += 2 + kBlock / 2) {
    if (clamp_block(y)) {
      store_half(codes, NAN);
      std::memset(codes + 2, 0, kBlock / 2);
      continue;
    }
    float largest = y[0];  // signed; ties pick the first
    for (int i = 1; i < kBlock; ++i)
      largest = std::fabs(y[i]) > std::fabs(largest) ? y[i] : largest;
    const float d = largest / -8;
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
