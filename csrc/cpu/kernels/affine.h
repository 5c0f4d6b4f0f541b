// Affine int8/int4/int2: x ~ code * scale + bias per group (reference._encode_affine).
#pragma once

#include <bit>

#include "codes.h"

namespace kvq::cpu::KVQ_ISA {

/// A number c for each of kWidth groups: where it is not NaN, the code of x is the whole part of
/// x * reciprocal + c. bias and 1 / reciprocal are float16 numbers.
///
/// Codes change on edges, where x - bias + scale / 2 is a multiple of scale. That is a multiple of
/// the last bit of x, bias or scale / 2, which have few bits: it lies on an edge or kGrid steps
/// away from it, at least, unless x or bias is next to zero (which itself lies on any grid). Small
/// x are away from any edge if zero is. The product and the sums err by less than kError steps,
/// fused or not; with kError added an edge is never missed, and what lies below never reaches it.
/// Nor do the roundings in reference.py's code: on an edge there are none.
template <int Bits>
[[gnu::always_inline]] inline F straight_start(F high, F bias, F reciprocal, int precision) {
  constexpr float kGrid = 1.0f / (1 << 15), kError = 1.0f / (1 << 16);
  const F never = splat(NAN), zero = splat(0.0f);
  const F b = bias * reciprocal, size = magnitude(b, b);
  const F edge = splat(0.5f) - b, beside = edge - rounded(edge);
  F start = edge + splat(kError);
  const F small = splat(kGrid * static_cast<float>(1 << precision) + kGrid);
  start = select_less(small, magnitude(beside, beside), start, never);
  start = select_less(size, splat(kGrid * (1 << 11)), select_equal(b, zero, start, never), start);
  start = select_less(size, splat(2 << Bits), start, never);  // kError holds up to there
  // A tiny scale may be rounded to much less than it was.
  return select_less(fma(high, reciprocal, start), splat(1 << Bits), start, never);
}

/// HalfScale: scales are float16.
template <int Bits, bool HalfScale>
[[gnu::noinline]] void encode_affine(const Batch& batch, const Layout& layout) {
  constexpr float kLevels = (1 << Bits) - 1;
  constexpr bool kStraight = HalfScale && Bits <= 4;
  const KvqDtype dtype = layout.scale_dtype;
  const int n = static_cast<int>(layout.head_dim), group = layout.group, per_row = n / group;
  const int groups = batch.rows * per_row;
  GroupValues low, high, bias, scale, reciprocal, start;
  group_ranges(batch.y, group, groups, HalfScale ? KVQ_F16_MAX : KVQ_LIMIT, low, high);
  each_vector(groups, [&](int k) {
    const F least = load(low + k), greatest = load(high + k), offset = round_scale(least, dtype);
    const F divisor = round_divisor((greatest - least) / splat(kLevels), dtype);
    const F inverse = splat(1.0f) / divisor;
    store(bias + k, offset);
    store(scale + k, divisor);
    store(reciprocal + k, inverse);
    if constexpr (kStraight) {
      store(start + k, straight_start<Bits>(greatest, offset, inverse, batch.precision));
    }
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
      const F inverse = splat(reciprocal[k]);
      if (kStraight && start[k] == start[k]) {
        const F first = splat(start[k]);
        store_codes<Bits>(codes, [&](int j) KVQ_INLINE {
          return truncate_to_int(fma(load(y + j), inverse, first));
        });
        continue;
      }
      const F offset = splat(bias[k]), divisor = splat(scale[k]);
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
