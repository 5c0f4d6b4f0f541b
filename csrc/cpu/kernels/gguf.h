// GGUF q8_0 and q4_0 blocks of 32: bytes equal to the gguf package's quants.quantize
// (reference._encode_gguf).
#pragma once

#include <cmath>
#include <cstdint>

#include "codes.h"
#include "convert.h"
#include "lanes.h"

namespace kvq::cpu::KVQ_ISA {

constexpr int kBlock = 32;

inline void store_half(uint8_t* p, float x) {
  store_scale(reinterpret_cast<char*>(p), 0, KVQ_FLOAT16, x);
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
    for (int i = 0; i < kBlock; i += kWidth) {
      // Halves are rounded away from zero.
      const F scaled = load(y + i) * splat(inverse);
      const I sign = shift_right_signed<31>(as_int(scaled));
      const F size = as_float(bit_and(as_int(scaled), splat_int(0x7fffffff)));
      const I whole = truncate_to_int(size);
      const F rest = size - to_float(whole);
      const I q = add_int(whole, truncate_to_int(rest + rest));
      // Two's complement where the sign is negative.
      store_codes<8>(codes + 2 + i, add_int(bit_xor(q, sign), shift_right<31>(sign)));
    }
  }
}

/// The first element of this magnitude, with its sign: where two tie, ggml takes the first.
inline float first_of_magnitude(const float* y, const GroupRange& range) {
  const float size = magnitude(range);
  // Only where both signs have it does the order matter.
  if (range.high != -range.low) [[likely]]
    return std::copysign(size, range.high + range.low);
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
    const float d = first_of_magnitude(y, range) / -8;
    const float inverse = d == 0 ? 0.0f : 1 / d;
    store_half(codes, d);
    if (std::isinf(inverse)) {  // d < 2^-128 is stored as 0
      std::memset(codes + 2, 0, kBlock / 2);
      continue;
    }
    const auto code = [&](const float* p) {  // two float32 roundings, as ggml's
      const F v = load(p) * splat(inverse) + splat(8.5f);
      return truncate_to_int(bounded(v, 0.0f, 15.0f));
    };
    for (int i = 0; i < kBlock / 2; i += kWidth) {
      const I low = code(y + i), high = code(y + i + kBlock / 2);
      store_codes<8>(codes + 2 + i, bit_or(low, shift_left<4>(high)));
    }
  }
}

}  // namespace kvq::cpu::KVQ_ISA
