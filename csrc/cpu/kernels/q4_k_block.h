// One Q4_K super-block: its six-bit scales, its values, and the search for them
// (reference.q4_k_quantize).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "convert.h"
#include "lanes.h"
#include "q4_k.h"

namespace kvq::cpu::KVQ_ISA {

constexpr int kSubBlocks = 8;

/// The eight scales, then the eight minima, one byte each.
struct SixBits {
  uint32_t words[4];

  const uint8_t* scales() const { return reinterpret_cast<const uint8_t*>(words); }
  const uint8_t* minima() const { return scales() + 8; }
};

inline SixBits unpack_six_bits(const uint8_t* packed) {
  uint32_t u[3];
  std::memcpy(u, packed, 12);
  return {{u[0] & 0x3f3f3f3f, (u[2] & 0x0f0f0f0f) | ((u[0] >> 2) & 0x30303030), u[1] & 0x3f3f3f3f,
           ((u[2] >> 4) & 0x0f0f0f0f) | ((u[1] >> 2) & 0x30303030)}};
}

inline void pack_six_bits(const uint8_t* scales, const uint8_t* minima, uint8_t* packed) {
  for (int j = 0; j < 4; ++j) {
    packed[j] = static_cast<uint8_t>(scales[j] | scales[j + 4] >> 4 << 6);
    packed[j + 4] = static_cast<uint8_t>(minima[j] | minima[j + 4] >> 4 << 6);
    packed[j + 8] = static_cast<uint8_t>((scales[j + 4] & 15) | (minima[j + 4] & 15) << 4);
  }
}

/// Every value with the roundings of gguf's dequantize: (d * sc) * q - dmin * m.
inline void decode_q4_k(const KvqQ4KBlock& block, float* y) {
  const float d = half_to_float(block.d), dmin = half_to_float(block.dmin);
  const SixBits six = unpack_six_bits(block.scales);
  for (int j = 0; j < 8; j += 2) {
    const float step[] = {d * six.scales()[j], d * six.scales()[j + 1]};
    const float offset[] = {dmin * six.minima()[j], dmin * six.minima()[j + 1]};
    const uint8_t* codes = block.codes + 16 * j;
    for (int i = 0; i < 32; ++i) {
      y[32 * j + i] = step[0] * static_cast<float>(codes[i] & 15) - offset[0];
      y[32 * j + 32 + i] = step[1] * static_cast<float>(codes[i] >> 4) - offset[1];
    }
  }
}

/// 32 values, or what is computed of each.
struct SubBlock {
  Lanes a, b;
};

template <typename Function>
inline SubBlock each(const SubBlock& x, const Function& f) {
  return {f(x.a), f(x.b)};
}
template <typename Function>
inline SubBlock each(const SubBlock& x, const SubBlock& y, const Function& f) {
  return {f(x.a, y.a), f(x.b, y.b)};
}

/// In the order of reference._sum32.
inline float sum32(const SubBlock& x) {
  Lanes s = x.a + x.b;
  s = s + swap_lanes<8>(s);
  s = s + swap_lanes<4>(s);
  s = s + swap_lanes<2>(s);
  return s[0] + s[1];
}

inline SubBlock product(const SubBlock& x, const SubBlock& y) {
  return each(x, y, [](Lanes a, Lanes b) { return a * b; });
}

/// Clamped to [0, 15], then rounded to the nearest whole number, ties to even.
inline Lanes nearest_code(Lanes x) {
  const Lanes clamped = smaller(splat_lanes(15), larger(x, Lanes{}));
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
  return (clamped + kMagic) - kMagic;
}

struct Grid {
  float scale = 0, minimum = 0;  ///< both >= 0: x is about scale * q - minimum
};

/// reference._q4_k_search.
inline Grid search_grid(const SubBlock& x) {
  const float low = std::min(smallest_lane(smaller(x.a, x.b)), 0.0f);
  const float high = largest_lane(larger(x.a, x.b));
  if (high - low < KVQ_Q4_K_LEAST_SPAN) return {0, -low};
  const float rms = std::sqrt(sum32(product(x, x)) / 32);
  const SubBlock weights = each(x, [rms](Lanes v) { return rms + (v < Lanes{} ? -v : v); });
  const float sum_w = sum32(weights), sum_x = sum32(product(weights, x));
  const auto fit = [&](float numerator, float minimum) {
    const float inverse = numerator / (high - minimum);
    return each(x, [=](Lanes v) { return nearest_code(inverse * (v - minimum)); });
  };
  const auto error = [&](const SubBlock& q, float scale, float minimum) {
    const SubBlock difference =
        each(q, x, [=](Lanes code, Lanes value) { return (scale * code + minimum) - value; });
    return sum32(product(weights, product(difference, difference)));
  };
  float scale = 1 / (15 / (high - low)), minimum = low;
  float best = error(fit(15, low), scale, low);
  for (int step = 0; step <= 20; ++step) {
    const SubBlock q = fit(0.1f * static_cast<float>(step) + 14, minimum);
    const SubBlock weighted = product(weights, q);
    const float sum_q = sum32(weighted), sum_q2 = sum32(product(weighted, q)),
                sum_xq = sum32(product(weighted, x));
    const float determinant = sum_w * sum_q2 - sum_q * sum_q;
    if (!(determinant > 0)) continue;
    float new_scale = (sum_w * sum_xq - sum_x * sum_q) / determinant;
    float new_minimum = (sum_q2 * sum_x - sum_q * sum_xq) / determinant;
    if (new_minimum > 0) {
      new_scale = sum_xq / sum_q2;
      new_minimum = 0;
    }
    const float new_error = error(q, new_scale, new_minimum);
    if (new_error < best && high - new_minimum >= KVQ_Q4_K_LEAST_SPAN) {
      best = new_error;
      scale = new_scale;
      minimum = new_minimum;
    }
  }
  return {std::max(scale, 0.0f), -minimum};
}

/// x as a multiple, 0 to 63, of `top` over 63.
inline uint8_t six_bits(float x, float top) {
  const float inverse = top > 0 ? 63 / top : 0.0f;
  return static_cast<uint8_t>(std::nearbyint(std::clamp(inverse * x, 0.0f, 63.0f)));
}

/// 256 values, clamped in place, to a super-block.
inline void encode_q4_k(float* y, KvqQ4KBlock& block) {
  SubBlock x[kSubBlocks];
  Lanes nan{};
  for (int j = 0; j < kSubBlocks; ++j) {
    x[j] = each({load_lanes(y + 32 * j), load_lanes(y + 32 * j + 16)}, [](Lanes v) {
      return smaller(splat_lanes(KVQ_Q4_K_HIGHEST), larger(splat_lanes(KVQ_Q4_K_LOWEST), v));
    });
    nan = nan + x[j].a * 0.0f + x[j].b * 0.0f;
  }
  if (sum32({nan, Lanes{}}) != 0) {  // NaN
    std::memset(&block, 0, sizeof block);
    block.d = block.dmin = 0x7e00;
    return;
  }
  Grid grids[kSubBlocks], top;
  for (int j = 0; j < kSubBlocks; ++j) {
    grids[j] = search_grid(x[j]);
    top.scale = std::max(top.scale, grids[j].scale);
    top.minimum = std::max(top.minimum, grids[j].minimum);
  }
  uint8_t scales[kSubBlocks], minima[kSubBlocks];
  for (int j = 0; j < kSubBlocks; ++j) {
    scales[j] = six_bits(grids[j].scale, top.scale);
    minima[j] = six_bits(grids[j].minimum, top.minimum);
  }
  pack_six_bits(scales, minima, block.scales);
  const float d = store_scale(reinterpret_cast<char*>(&block.d), 0, KVQ_FLOAT16, top.scale / 63);
  const float dmin =
      store_scale(reinterpret_cast<char*>(&block.dmin), 0, KVQ_FLOAT16, top.minimum / 63);
  for (int j = 0; j < kSubBlocks; ++j) {
    const float step = d * scales[j], offset = dmin * minima[j];
    const SubBlock q = each(
        x[j], [=](Lanes v) { return step == 0 ? Lanes{} : nearest_code((v + offset) / step); });
    uint8_t* codes = block.codes + j / 2 * 32;
    for (int i = 0; i < 16; ++i) {
      const int low = static_cast<int>(q.a[i]), high = static_cast<int>(q.b[i]);
      if (j % 2 == 0) {
        codes[i] = static_cast<uint8_t>(low);
        codes[i + 16] = static_cast<uint8_t>(high);
      } else {
        codes[i] = static_cast<uint8_t>(codes[i] | low << 4);
        codes[i + 16] = static_cast<uint8_t>(codes[i + 16] | high << 4);
      }
    }
  }
}

}  // namespace kvq::cpu::KVQ_ISA
