// Affine int8/int4/int2: x ~ code * scale + bias per group (reference._encode_affine).
#pragma once

#include <bit>

#include "codes.h"

namespace kvq::cpu::KVQ_ISA {

/// HalfScale: scales are float16.
template <int Bits, bool HalfScale>
[[gnu::noinline]] void encode_affine(const Batch& batch, const Layout& layout) {
  constexpr float kLevels = (1 << Bits) - 1;
  const KvqDtype dtype = layout.scale_dtype;
  const int n = static_cast<int>(layout.head_dim), group = layout.group, per_row = n / group;
  const int groups = batch.rows * per_row;
  GroupValues low, high, bias, scale, reciprocal;
  group_ranges(batch.y, group, groups, HalfScale ? KVQ_F16_MAX : KVQ_LIMIT, low, high);
  each_vector(groups, [&](int k) {
    store(bias + k, round_scale(load(low + k), dtype));
    const F divisor = round_divisor((load(high + k) - load(low + k)) / splat(kLevels), dtype);
    store(scale + k, divisor);
    store(reciprocal + k, splat(1.0f) / divisor);
  });
  store_scales(scale, dtype, per_row, batch.rows, batch.scales);
  store_scales(bias, dtype, per_row, batch.rows, batch.biases);
  const int shift = std::countr_zero(static_cast<unsigned>(group));  // a power of two
  const float* y = batch.y;
  for (int r = 0; r < batch.rows; ++r) {
    batch.ask_next(r);
    uint8_t* codes = batch.bytes(r);
    for (int i = 0; i < n; i += kSlab, y += kSlab, codes += 4 * Bits) {
      const int k = r * per_row + (i >> shift);
      const F offset = splat(bias[k]), divisor = splat(scale[k]), inverse = splat(reciprocal[k]);
      store_codes<Bits>(codes, [&](int j) KVQ_INLINE {
        const F x = load(y + j) - offset;
        const F q = HalfScale ? quotient(x, divisor, inverse) : x / divisor;
        // Where it is not negative, to drop the fraction is floor. The operand order keeps NaN,
        // whose code is 0.
        return truncate_to_int(minimum(splat(kLevels), q + splat(0.5f)));
      });
    }
  }
}

template <int Bits>
void encode_affine(const Batch& batch, const Layout& layout) {
  if (layout.scale_dtype == KVQ_FLOAT16) return encode_affine<Bits, true>(batch, layout);
  encode_affine<Bits, false>(batch, layout);
}

}  // namespace kvq::cpu::KVQ_ISA
