// Affine int8/int4/int2: x ~ code * scale + bias per group (reference._encode_affine).
#pragma once

#include <cmath>
#include <cstdint>

#include "convert.h"

namespace kvq::cpu::KVQ_ISA {

constexpr int kLanes = 16;

/// y is clamped in place.
template <int Bits>
void encode_affine(float* y, const Layout& layout, uint8_t* codes, char* scales, char* biases) {
  constexpr float kLevels = (1 << Bits) - 1;
  const float limit = layout.scale_dtype == KVQ_FLOAT16 ? KVQ_F16_MAX : KVQ_LIMIT;
  const int group = layout.group;
  for (int64_t g = 0; g < layout.head_dim / group; ++g, y += group) {
    float low_lane[kLanes], high_lane[kLanes];
    int nan_lane[kLanes] = {};
    for (int j = 0; j < kLanes; ++j) low_lane[j] = limit, high_lane[j] = -limit;
    for (int i = 0; i < group; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) {
        float v = y[i + j];
        v = v > limit ? limit : v;
        v = v < -limit ? -limit : v;
        nan_lane[j] |= v != v;
        low_lane[j] = v < low_lane[j] ? v : low_lane[j];
        high_lane[j] = v > high_lane[j] ? v : high_lane[j];
        y[i + j] = v;
      }
    }
    float low = low_lane[0], high = high_lane[0];
    int nan = nan_lane[0];
    for (int j = 1; j < kLanes; ++j) {
      low = low_lane[j] < low ? low_lane[j] : low;
      high = high_lane[j] > high ? high_lane[j] : high;
      nan |= nan_lane[j];
    }
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
    for (int i = 0; i < group; ++i) {
      float v = (y[i] - bias) / scale + 0.5f;
      v = v < 0 ? 0 : v;
      v = v > kLevels ? kLevels : v;
      q[i] = static_cast<uint8_t>(static_cast<int>(v));  // v >= 0: truncation is floor
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
