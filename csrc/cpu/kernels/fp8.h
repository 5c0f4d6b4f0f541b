// fp8 e4m3 and e5m2 with one scale per group (reference._encode_fp8). Codes equal torch's casts.
#pragma once

#include <cmath>
#include <cstdint>

#include "convert.h"
#include "lanes.h"

namespace kvq::cpu::KVQ_ISA {

struct E4M3 {
  static constexpr int kMantissa = 3, kBias = 7;
  static constexpr float kMax = 448.0f;
};
struct E5M2 {
  static constexpr int kMantissa = 2, kBias = 15;
  static constexpr float kMax = 57344.0f;
};

/// |x| <= Format::kMax. Rounds to nearest even, with subnormals.
template <typename Format>
inline uint8_t float_to_fp8(float x) {
  constexpr int kShift = 23 - Format::kMantissa;
  constexpr uint32_t kRebias = uint32_t(127 - Format::kBias) << 23;
  constexpr uint32_t kSmallestNormal = kRebias + (1u << 23);
  // Adding this float aligns its last bit with the smallest subnormal, and so rounds there.
  constexpr uint32_t kAlign = uint32_t(127 + 1 - Format::kBias + kShift) << 23;
  const uint32_t u = bits_of(x), magnitude = u & 0x7fffffff;
  const uint32_t odd = (magnitude >> kShift) & 1;
  const uint32_t normal = (magnitude - kRebias + ((1u << (kShift - 1)) - 1) + odd) >> kShift;
  const uint32_t subnormal = bits_of(float_of(magnitude) + float_of(kAlign)) - kAlign;
  return uint8_t((u >> 24 & 0x80) | (magnitude < kSmallestNormal ? subnormal : normal));
}

/// Every byte's value; bytes that torch reads as NaN or infinity are NaN and infinity.
template <typename Format>
struct Fp8Table {
  float value[256];
  Fp8Table() {
    for (int code = 0; code < 256; ++code) {
      const int exponent = (code & 0x7f) >> Format::kMantissa;
      const int mantissa = code & ((1 << Format::kMantissa) - 1);
      const float fraction = static_cast<float>(mantissa) / (1 << Format::kMantissa);
      float x = exponent ? std::ldexp(1 + fraction, exponent - Format::kBias)
                         : std::ldexp(fraction, 1 - Format::kBias);
      if (x > Format::kMax) x = Format::kBias == 15 && mantissa == 0 ? INFINITY : NAN;
      value[code] = code & 0x80 ? -x : x;
    }
  }
};

template <typename Format>
inline const float* fp8_values() {
  static const Fp8Table<Format> table;
  return table.value;
}

/// y is clamped in place.
template <typename Format>
void encode_fp8(float* y, const Layout& layout, uint8_t* codes, char* scales) {
  const int group = layout.group;
  for (int64_t g = 0; g < layout.head_dim / group; ++g, y += group, codes += group) {
    const GroupRange range = clamp_group(y, group, KVQ_LIMIT);
    if (range.nan) {
      store_scale(scales, g, layout.scale_dtype, NAN);
      std::memset(codes, 0, group);
      continue;
    }
    float scale = store_scale(scales, g, layout.scale_dtype, magnitude(range) / Format::kMax);
    if (scale == 0) scale = store_scale(scales, g, layout.scale_dtype, 1.0f);
    for (int i = 0; i < group; ++i) {
      float v = y[i] / scale;
      v = v > Format::kMax ? Format::kMax : v;
      v = v < -Format::kMax ? -Format::kMax : v;
      codes[i] = float_to_fp8<Format>(v);
    }
  }
}

template <typename Format>
void decode_fp8(const uint8_t* codes, const char* scales, const Layout& layout, float* y) {
  const float* value = fp8_values<Format>();
  const int group = layout.group;
  for (int64_t g = 0; g < layout.head_dim / group; ++g, y += group, codes += group) {
    const float scale = load_scale(scales, g, layout.scale_dtype);
    for (int i = 0; i < group; ++i) y[i] = value[codes[i]] * scale;
  }
}

}  // namespace kvq::cpu::KVQ_ISA
