// Affine int8/int4/int2: x ~ code * scale + bias per group (reference._encode_affine).
#pragma once

#include <cmath>
#include <cstdint>

#include "codes.h"
#include "convert.h"
#include "lanes.h"

namespace kvq::cpu::KVQ_ISA {

constexpr int kMaxGroups = kMaxHeadDim / 32;

/// Codes of a group; HalfScale: the scale is a float16.
template <int Bits, bool HalfScale>
inline void encode_codes(const float* y, int group, float bias, float scale, uint8_t* codes) {
  constexpr float kLevels = (1 << Bits) - 1;
  const F reciprocal = splat(1.0f / scale);
  for (int i = 0; i < group; i += 32, codes += 4 * Bits) {
    unroll<32 / kWidth>([&](auto j) {
      const F x = load(y + i + j * kWidth) - splat(bias);
      const F q = HalfScale ? quotient(x, splat(scale), reciprocal) : x / splat(scale);
      // Not negative: to drop the fraction is floor.
      const F code = bounded(q + splat(0.5f), 0.0f, kLevels);
      store_codes<Bits>(codes + j * kWidth * Bits / 8, truncate_to_int(code));
    });
  }
}

/// y is clamped in place. Scales first, then codes: the groups' long chains of dependent
/// operations overlap.
template <int Bits>
void encode_affine(float* y, const Layout& layout, uint8_t* codes, char* scales, char* biases) {
  constexpr float kLevels = (1 << Bits) - 1;
  const KvqDtype dtype = layout.scale_dtype;
  const float limit = dtype == KVQ_FLOAT16 ? KVQ_F16_MAX : KVQ_LIMIT;
  const int group = layout.group;
  const int groups = static_cast<int>(layout.head_dim) / group;
  float scale[kMaxGroups], bias[kMaxGroups];
  for (int g = 0; g < groups; ++g) {
    const auto [low, high, nan] = clamp_group(y + g * group, group, limit);
    bias[g] = store_scale(biases, g, dtype, nan ? NAN : low == 0 ? 0.0f : low);
    scale[g] = store_scale(scales, g, dtype, nan ? NAN : (high - low) / kLevels);
    if (scale[g] == 0) scale[g] = store_scale(scales, g, dtype, 1.0f);
  }
  for (int g = 0; g < groups; ++g, y += group, codes += group * Bits / 8) {
    if (bias[g] != bias[g]) {
      std::memset(codes, 0, group * Bits / 8);
    } else if (dtype == KVQ_FLOAT16) {
      encode_codes<Bits, true>(y, group, bias[g], scale[g], codes);
    } else {
      encode_codes<Bits, false>(y, group, bias[g], scale[g], codes);
    }
  }
}

}  // namespace kvq::cpu::KVQ_ISA
