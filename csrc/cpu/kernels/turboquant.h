// TurboQuant: a rotated vector as Lloyd-Max codes and one norm (reference._encode_turboquant).
#pragma once

#include <cmath>
#include <cstdint>

#include "../../shared/codebook.h"
#include "codes.h"
#include "convert.h"
#include "lanes.h"

namespace kvq::cpu::KVQ_ISA {

/// Sum of a[i] * b[i] in the order of reference._sum32: 32 lanes, then a butterfly.
inline float dot32(const float* a, const float* b, int64_t n) {
  Lanes first{}, second{};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    first += load_lanes(a + i) * load_lanes(b + i);
    second += load_lanes(a + i + kLanes) * load_lanes(b + i + kLanes);
  }
  if (i < n) {  // the last lanes get fewer terms
    float left[32] = {}, right[32] = {};
    std::memcpy(left, a + i, (n - i) * sizeof(float));
    std::memcpy(right, b + i, (n - i) * sizeof(float));
    first += load_lanes(left) * load_lanes(right);
    second += load_lanes(left + kLanes) * load_lanes(right + kLanes);
  }
  Lanes sum = first + second;
  sum = sum + swap_lanes<8>(sum);
  sum = sum + swap_lanes<4>(sum);
  sum = sum + swap_lanes<2>(sum);
  return sum[0] + sum[1];
}

/// Up to how many bits the boundaries above 0 fill no more than two registers that can be permuted.
#if defined(__AVX512F__)
constexpr int kMostPermutedBits = 6;
#elif defined(__AVX2__)
constexpr int kMostPermutedBits = 4;
#else
constexpr int kMostPermutedBits = 0;
#endif

/// Finds codes, the number of boundaries below z, by a uniform grid of cells, each with at most one
/// boundary inside.
template <int Bits, bool Permuted = Bits <= kMostPermutedBits>
class CodeSearch {
 public:
  static const CodeSearch& get() {
    static const CodeSearch search;
    return search;
  }

  I find(F z) const {
    const I cell = cell_of(z);
    const F below = gather(below_, cell), edge = gather(edge_, cell);
    return truncate_to_int(select_less(edge, z, below + splat(1.0f), below));
  }

 private:
  static constexpr int kCells = 1024;  // narrower than the closest two boundaries at 8 bits
  static constexpr float kReach = 5.0f;

  CodeSearch() {
    for (int cell = 0; cell < kCells; ++cell) below_[cell] = 0, edge_[cell] = INFINITY;
    for (int i = 0; i < (1 << Bits) - 1; ++i) {
      const float edge = kvq_boundaries(Bits)[i];
      alignas(64) int32_t cell[kWidth];
      const I all = cell_of(splat(edge));
      std::memcpy(cell, &all, sizeof cell);
      // cell_of never decreases: what is in a later cell is above this boundary.
      edge_[cell[0]] = edge;
      for (int later = cell[0] + 1; later < kCells; ++later) ++below_[later];
    }
  }

  static I cell_of(F z) {
    const F at = (z + splat(kReach)) * splat(kCells / (2 * kReach));
    return truncate_to_int(bounded(at, 0.0f, kCells - 1));
  }

  float below_[kCells];  ///< boundaries in earlier cells
  float edge_[kCells];   ///< the boundary in this cell, or infinity
};

#if defined(__AVX2__)
/// The same by halves, among the boundaries above 0: they lie symmetrically about it.
template <int Bits>
class CodeSearch<Bits, true> {
 public:
  static CodeSearch get() { return {}; }

  I find(F z) const {
    // Boundaries below -a are all but those up to a, which are those below the next number.
    const I negative = as_int(select_less(splat(0.0f), z, splat(0.0f), as_float(splat_int(~0u))));
    const I magnitude = bit_and(as_int(z), splat_int(0x7fffffff));
    const F a = as_float(sub_int(magnitude, negative));
    I count = splat_int(0);
    unroll<Bits - 1>([&](auto step) KVQ_INLINE {
      constexpr int kHalf = 1 << (Bits - 2 - step);
      const F edge = edge_at(add_int(count, splat_int(kHalf - 1)));
      const F half = as_float(splat_int(kHalf));
      count = bit_or(count, as_int(select_less(edge, a, half, splat(0.0f))));
    });
    return add_int(bit_xor(count, negative), splat_int(kPositive + 1));
  }

 private:
  static constexpr int kPositive = (1 << (Bits - 1)) - 1;

  CodeSearch() {
    float entries[2 * kWidth] = {};
    std::memcpy(entries, kvq_boundaries(Bits) + kPositive + 1, kPositive * sizeof(float));
    first_ = load(entries), second_ = load(entries + kWidth);
  }

  F edge_at(I index) const {
#if defined(__AVX512F__)
    if constexpr (kPositive > kWidth) return _mm512_permutex2var_ps(first_, index, second_);
    return _mm512_permutexvar_ps(index, first_);
#else
    return _mm256_permutevar8x32_ps(first_, index);
#endif
  }

  F first_, second_;
};
#endif

/// The codes q of one row, as a stream of Bits bits each.
template <int Bits>
inline void pack_row(const uint8_t* q, int64_t n, uint8_t* out) {
  int64_t i = 0;
  for (; i + kSlab <= n; i += kSlab, out += 4 * Bits) pack<Bits>(load_bytes(q + i), out);
  for (; i < n; i += 8, out += Bits) pack8<Bits>(q + i, out);
}

template <int Bits>
[[gnu::noinline]] void encode_turboquant(const Batch& batch, const Layout& layout,
                                         KvqEncoder encoder) {
  const int64_t n = layout.head_dim;
  const KvqDtype dtype = layout.scale_dtype;
  float squares[kBatchRows], norm[kBatchRows];
  for (int r = 0; r < batch.rows; ++r) {
    squares[r] = norm[r] = dot32(batch.y + r * n, batch.y + r * n, n);
  }
  for (int r = 0; r < batch.rows; r += kWidth) {
    store(norm + r, round_scale(square_root(load(norm + r) / splat(static_cast<float>(n))), dtype));
  }
  store_scales(norm, dtype, 1, batch.rows, batch.scales);
  const auto search = CodeSearch<Bits>::get();
  for (int r = 0; r < batch.rows; ++r) {
    batch.ask_next(r);
    uint8_t* codes = batch.bytes(r);
    if (norm[r] != norm[r]) {
      std::memset(codes, 0, n * Bits / 8);
      continue;
    }
    const float* y = batch.y + r * n;
    const F divisor = splat(norm[r] == 0 ? 1.0f : norm[r]);
    uint8_t q[kMaxHeadDim + kSlab];
    for (int64_t i = 0; i < n; i += kSlab) {
      store_codes<8>(q + i,
                     [&](int j) KVQ_INLINE { return search.find(load(y + i + j) / divisor); });
    }
    pack_row<Bits>(q, n, codes);
    if (encoder == KVQ_ENCODER_UNBIASED) {
      float centroid[kMaxHeadDim];
      for (int64_t i = 0; i < n; ++i) centroid[i] = kvq_codebook(Bits)[q[i]];
      const float dot = dot32(y, centroid, n);
      if (dot > 0) store_scale(batch.scales[r], 0, dtype, squares[r] / dot);
    }
  }
}

}  // namespace kvq::cpu::KVQ_ISA
