// From floats to packed codes. Every operation rounds once, as
// reference.py says, so that codes are the same on every processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace kvq::cpu::KVQ_ISA {

constexpr int64_t kMaxHeadDim = 1024;

struct GroupRange {
  float low, high;
  bool nan;
};

/// The larger magnitude of a range's ends; never a negative zero.
inline float magnitude(const GroupRange& range) {
  return std::fabs(-range.low > range.high ? range.low : range.high);
}

/// The range of a group (a multiple of 32 elements); NaN counts for nothing.
inline GroupRange group_range(const float* y, int group) {
  F low = load(y), high = low;
  bool nan = false;
  for (int i = 0; i < group; i += 2 * kWidth) {
    const F a = load(y + i), b = load(y + i + kWidth);
    // The operand order drops NaN: the second operand comes back.
    low = minimum(a, minimum(b, low));
    high = maximum(a, maximum(b, high));
    nan |= any_unordered(a, b);
  }
  return {-largest(splat(0.0f) - low), largest(high), nan};
}

/// Clamp a group in place and find its range.
inline GroupRange clamp_group(float* y, int group, float limit) {
  GroupRange range = group_range(y, group);
  if (range.nan || (range.low >= -limit && range.high <= limit)) [[likely]]
    return range;
  for (int i = 0; i < group; i += kWidth) {
    store(y + i, minimum(splat(limit), maximum(splat(-limit), load(y + i))));
  }
  return group_range(y, group);
}

/// x / divisor, correctly rounded, for a divisor that is a float16; reciprocal is 1 / divisor.
///
/// A divisor of 11 significant bits leaves every quotient at least 2^-36 of itself away from where
/// its rounding changes. One correction is good to 2^-45: it cannot fall on the wrong side.
inline F quotient(F x, F divisor, F reciprocal) {
#if defined(__FMA__) || defined(__aarch64__)
  const F q = x * reciprocal;
  return fma(fma(q, splat(0.0f) - divisor, x), reciprocal, q);
#else
  return x / divisor;
#endif
}

/// x within [low, high]; NaN becomes low.
inline F bounded(F x, float low, float high) {
  return minimum(maximum(x, splat(low)), splat(high));
}

/// The low bytes of kWidth integers, one after the other.
#if defined(__AVX2__)
inline __m128i low_bytes(I x) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_epi8(x);
#else
  const __m256i pick = _mm256_set1_epi32(0x0c080400);
  const __m256i bytes = _mm256_shuffle_epi8(x, pick);
  return _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
#endif
}
#endif

/// Stores kWidth codes of Bits bits, the first in the lowest bits. Of 8 bits the low byte is taken;
/// others must have no higher bits.
template <int Bits>
inline void store_codes(uint8_t* out, I codes) {
  constexpr int kBytes = kWidth * Bits / 8;
#if defined(__AVX2__)
  __m128i x = low_bytes(codes);
  if constexpr (Bits == 4) {
    x = _mm_or_si128(x, _mm_srli_epi16(x, 4));
    x = _mm_shuffle_epi8(x, _mm_set1_epi64x(0x0e0c0a0806040200));
  } else if constexpr (Bits == 2) {
    x = _mm_or_si128(x, _mm_srli_epi32(x, 6));
    x = _mm_or_si128(x, _mm_srli_epi32(x, 12));
    x = _mm_shuffle_epi8(x, _mm_set1_epi32(0x0c080400));
  }
  std::memcpy(out, &x, kBytes);
#else
  if constexpr (Bits == 8) {
    for (int i = 0; i < kWidth; ++i) out[i] = static_cast<uint8_t>(codes[i]);
  } else {
    uint32_t word = 0;
    for (int i = 0; i < kWidth; ++i) word |= static_cast<uint32_t>(codes[i]) << (i * Bits);
    for (int i = 0; i < kBytes; ++i) out[i] = static_cast<uint8_t>(word >> (8 * i));
  }
#endif
}

}  // namespace kvq::cpu::KVQ_ISA
