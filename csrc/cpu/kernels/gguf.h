// GGUF q8_0 and q4_0 blocks of 32: bytes equal to the gguf package's quants.quantize
// (reference._encode_gguf).
#pragma once

#include <cmath>
#include <cstdint>

#include "codes.h"
#include "convert.h"

namespace kvq::cpu::KVQ_ISA {

constexpr int kBlock = 32;

/// A batch's blocks: y, d, its inverse, and where their bytes go. The inverse is NaN, so that codes
/// become 0, where d is NaN or too small for one (d < 2^-128 is stored as 0).
template <int BlockBytes, typename Encode>
[[gnu::always_inline]] inline void encode_blocks(const Batch& batch, const Layout& layout,
                                                 const GroupValues& d, const Encode& encode) {
  const int per_row = static_cast<int>(layout.head_dim) / kBlock;
  GroupValues inverse;
  uint16_t header[kBatchGroups];
  each_vector(batch.rows * per_row, [&](int k) {
    const F x = load(d + k), zero = splat(0.0f), infinity = splat(INFINITY);
    F reciprocal = splat(1.0f) / x;
    reciprocal = select_equal(magnitude(reciprocal, reciprocal), infinity, splat(NAN), reciprocal);
    store(inverse + k, select_equal(x, zero, zero, reciprocal));
    store_as(KVQ_FLOAT16, reinterpret_cast<char*>(header + k), round_scale(x, KVQ_FLOAT16));
  });
  const float* y = batch.y;
  for (int r = 0, k = 0; r < batch.rows; ++r) {
    batch.ask_next(r);
    uint8_t* out = batch.bytes(r);
    for (int b = 0; b < per_row; ++b, ++k, y += kBlock, out += BlockBytes) {
      std::memcpy(out, header + k, 2);
      encode(y, splat(inverse[k]), out + 2);
    }
  }
}

[[gnu::noinline]] inline void encode_q8_0(const Batch& batch, const Layout& layout) {
  const int groups = batch.rows * static_cast<int>(layout.head_dim) / kBlock;
  GroupValues low, high, d;
  group_ranges(batch.y, kBlock, groups, KVQ_LIMIT, low, high);
  each_vector(groups, [&](int k) {
    store(d + k, magnitude(load(low + k), load(high + k)) / splat(127.0f));
  });
  encode_blocks<2 + kBlock>(
      batch, layout, d, [](const float* y, F inverse, uint8_t* out) KVQ_INLINE {
        store_codes<8>(out, [&](int j) KVQ_INLINE {
          // Halves are rounded away from zero.
          const F scaled = load(y + j) * inverse;
          const I sign = shift_right_signed<31>(as_int(scaled));
          // The operand order makes 0 of NaN.
          const F size =
              maximum(as_float(bit_and(as_int(scaled), splat_int(0x7fffffff))), splat(0.0f));
          const I whole = truncate_to_int(size);
          const F rest = size - to_float(whole);
          const I q = add_int(whole, truncate_to_int(rest + rest));
          // Two's complement where the sign is negative.
          return bit_and(add_int(bit_xor(q, sign), shift_right<31>(sign)), splat_int(0xff));
        });
      });
}

/// The first element of the largest magnitude, with its sign: where two tie, ggml takes the first.
inline float first_of_magnitude(const float* y, float low, float high) {
  // Only where both signs have it does the order matter.
  if (high != -low) [[likely]]
    return high > -low ? high : low;
  while (std::fabs(*y) != high) ++y;
  return *y;
}

[[gnu::noinline]] inline void encode_q4_0(const Batch& batch, const Layout& layout) {
  const int groups = batch.rows * static_cast<int>(layout.head_dim) / kBlock;
  GroupValues low, high, d = {};
  group_ranges(batch.y, kBlock, groups, KVQ_LIMIT, low, high);
  for (int k = 0; k < groups; ++k) {
    d[k] = first_of_magnitude(batch.y + k * kBlock, low[k], high[k]) / -8;
  }
  encode_blocks<2 + kBlock / 2>(
      batch, layout, d, [](const float* y, F inverse, uint8_t* out) KVQ_INLINE {
        const auto code = [&](int j) KVQ_INLINE {  // two float32 roundings, as ggml's
          const F v = load(y + j) * inverse + splat(8.5f);
          return truncate_to_int(bounded(v, 0.0f, 15.0f));
        };
        for (int j = 0; j < kBlock / 2; j += kWidth) {
          store_bytes(out + j, bit_or(code(j), shift_left<4>(code(j + kBlock / 2))));
        }
      });
}

}  // namespace kvq::cpu::KVQ_ISA
