// Affine int8/int4/int2: x ~ code * scale + bias per group (reference._encode_affine).
#pragma once

#include <cmath>
#include <cstdint>

#include "convert.h"
#include "lanes.h"

namespace kvq::cpu::KVQ_ISA {

/// y is clamped in place.
template <int Bits>
void encode_affine(float* y, const Layout& layout, uint8_t* codes, char* scales, char* biases) {
  constexpr float kLevels = (1 << Bits) - 1;
  const float limit = layout.scale_dtype == KVQ_FLOAT16 ? KVQ_F16_MAX : KVQ_LIMIT;
  const int group = layout.group;
  for (int64_t g = 0; g < layout.head_dim / group; ++g, y += group) {
    const auto [low, high, nan] = clamp_group(y, group, limit);
    uint8_t* out = codes + g * group * Bits / 8;
    if (nan) {
      store_scale(scales, g, layout.scale_dtype, NAN);
      store_scale(biases, g, layout.scale_dtype, NAN);
      std::memset(out, 0, group * Bits / 8);
      continue;
    }
    const float bias = store_scale(biases, g, layout.scale_dtype, low == 0 ? 0.0f : low);
    float scale = store_scale(scales, g, layout.scale_dtype, (high - low) / kLevels);
    if (scale == 0) scale = store_scale(scales, g, layout.scale_dtype, 1.0f);
    uint8_t q[128];
    for (int i = 0; i < group; i += kLanes) {
      Lanes v = (load_lanes(y + i) - bias) / scale + 0.5f;
      v = smaller(larger(v, Lanes{}), splat_lanes(kLevels));
      const LaneMask code = __builtin_convertvector(v, LaneMask);  // v >= 0: floor
      for (int j = 0; j < kLanes; ++j) q[i + j] = static_cast<uint8_t>(code[j]);
    }
    if constexpr (Bits == 8) {
      std::memcpy(out, q, group);
    } else if constexpr (Bits == 4) {
      for (int i = 0; i < group / 2; ++i) out[i] = q[2 * i] | q[2 * i + 1] << 4;
    } else {
      for (int i = 0; i < group / 4; ++i) {
        out[i] = q[4 * i] | q[4 * i + 1] << 2 | q[4 * i + 2] << 4 | q[4 * i + 3] << 6;
      }
    }
  }
}

template <int Bits>
void decode_affine(const uint8_t* codes, const char* scales, const char* biases,
                   const Layout& layout, float* y) {
  constexpr int kPerByte = 8 / Bits;
  constexpr int kMask = (1 << Bits) - 1;
  const int group = layout.group;
  for (int64_t g = 0; g < layout.head_dim / group; ++g, y += group) {
    const float scale = load_scale(scales, g, layout.scale_dtype);
    const float bias = load_scale(biases, g, layout.scale_dtype);
    const uint8_t* in = codes + g * group / kPerByte;
    for (int i = 0; i < group / kPerByte; ++i) {
      for (int j = 0; j < kPerByte; ++j) {
        y[i * kPerByte + j] = static_cast<float>((in[i] >> (j * Bits)) & kMask) * scale + bias;
      }
    }
  }
}

}  // namespace kvq::cpu::KVQ_ISA
