// fp8 e4m3 and e5m2 with one scale per group (reference._encode_fp8). Codes equal torch's casts.
#pragma once

#include <cmath>
#include <cstdint>

#include "codes.h"
#include "convert.h"

namespace kvq::cpu::KVQ_ISA {

struct E4M3 {
  static constexpr int kMantissa = 3, kBias = 7;
  static constexpr float kMax = 448.0f;
};
struct E5M2 {
  static constexpr int kMantissa = 2, kBias = 15;
  static constexpr float kMax = 57344.0f;
};

/// |x| <= Format::kMax. Rounds to nearest even, with subnormals; the code is in the low byte.
template <typename Format>
inline I float_to_fp8(F x) {
  constexpr int kShift = 23 - Format::kMantissa;
  constexpr uint32_t kRebias = uint32_t(127 - Format::kBias) << 23;
  const F smallest_normal = splat(float_of(kRebias + (1u << 23)));
  // Adding this float aligns its last bit with the smallest subnormal, and so rounds there.
  constexpr uint32_t kAlign = uint32_t(127 + 1 - Format::kBias + kShift) << 23;
  const I magnitude = bit_and(as_int(x), splat_int(0x7fffffff));
  const I odd = bit_and(shift_right<kShift>(magnitude), splat_int(1));
  const I half = splat_int((1u << (kShift - 1)) - 1 - kRebias);
  const I normal = shift_right<kShift>(add_int(add_int(magnitude, odd), half));
  const I subnormal =
      add_int(as_int(as_float(magnitude) + splat(float_of(kAlign))), splat_int(0u - kAlign));
  const F code =
      select_less(as_float(magnitude), smallest_normal, as_float(subnormal), as_float(normal));
  return bit_or(as_int(code), bit_and(shift_right<24>(as_int(x)), splat_int(0x80)));
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

template <typename Format>
[[gnu::noinline]] void encode_fp8(const Batch& batch, const Layout& layout) {
  const int group = layout.group, per_row = static_cast<int>(layout.head_dim) / group;
  const int groups = batch.rows * per_row;
  GroupValues low, high, scale;
  group_ranges(batch.y, group, groups, KVQ_LIMIT, low, high);
  each_vector(groups, [&](int k) {
    const F largest = magnitude(load(low + k), load(high + k));
    store(scale + k, round_divisor(largest / splat(Format::kMax), layout.scale_dtype));
  });
  store_scales(scale, layout.scale_dtype, per_row, batch.rows, batch.scales);
  const float* y = batch.y;
  for (int r = 0, k = 0; r < batch.rows; ++r) {
    batch.ask_next(r);
    uint8_t* codes = batch.bytes(r);
    for (int g = 0; g < per_row; ++g, ++k) {
      const F divisor = splat(scale[k]);
      const bool nan = scale[k] != scale[k];
      for (int i = 0; i < group; i += kSlab, y += kSlab, codes += kSlab) {
        if (nan) [[unlikely]] {
          std::memset(codes, 0, kSlab);
          continue;
        }
        store_codes<8>(codes, [&](int j) KVQ_INLINE {
          return float_to_fp8<Format>(bounded(load(y + j) / divisor, -Format::kMax, Format::kMax));
        });
      }
    }
  }
}

}  // namespace kvq::cpu::KVQ_ISA
