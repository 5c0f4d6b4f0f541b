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

/// Up to how many bits codes are found by permutations of registers.
#if defined(__AVX512F__)
constexpr int kMostPermutedBits = 8;
#elif defined(__AVX2__)
constexpr int kMostPermutedBits = 5;
#else
constexpr int kMostPermutedBits = 0;
#endif

/// Vectors whose codes are found side by side: whole slabs.
constexpr int kAtOnce = kSlab / kWidth < 4 ? 4 : kSlab / kWidth;

/// Finds codes, the number of boundaries below z, by a uniform grid of cells, each with at most one
/// boundary inside.
template <int Bits, bool Permuted = Bits <= kMostPermutedBits>
class CodeSearch {
 public:
  static const CodeSearch& get() {
    static const CodeSearch search;
    return search;
  }

  void find(const F (&z)[kAtOnce], I (&code)[kAtOnce]) const {
    for (int i = 0; i < kAtOnce; ++i) {
      const I cell = cell_of(z[i]);
      const F below = gather(below_, cell), edge = gather(edge_, cell);
      code[i] = truncate_to_int(select_less(edge, z[i], below + splat(1.0f), below));
    }
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
  static const CodeSearch& get() {
    static const CodeSearch search;
    return search;
  }

  /// Level by level: the chains of one vector after another would not overlap.
  void find(const F (&z)[kAtOnce], I (&code)[kAtOnce]) const {
    I negative[kAtOnce];
    F a[kAtOnce];
    unroll<kAtOnce>([&](auto i) KVQ_INLINE {
      // Boundaries below -a are all but those up to a, which are those below the next number.
      negative[i] = as_int(select_less(splat(0.0f), z[i], splat(0.0f), as_float(splat_int(~0u))));
      a[i] = as_float(sub_int(bit_and(as_int(z[i]), splat_int(0x7fffffff)), negative[i]));
      code[i] = splat_int(0);
    });
    unroll<kLevels>([&](auto level) KVQ_INLINE {
      unroll<kAtOnce>([&](auto i) KVQ_INLINE {
        const F edge = lookup<1 << level>(edges_[level], code[i]);
        code[i] = increment_less(add_int(code[i], code[i]), edge, a[i]);
      });
    });
    unroll<kAtOnce>([&](auto i) KVQ_INLINE {
      code[i] = add_int(bit_xor(code[i], negative[i]), splat_int(1 << kLevels));
    });
  }

 private:
  static constexpr int kLevels = Bits - 1;
  static constexpr int kLargest = 1 << (kLevels - 1);
  static constexpr int kEntries = kLargest < kWidth ? kWidth : kLargest;

  CodeSearch() {
    const float* positive = kvq_boundaries(Bits) + (1 << kLevels);
    for (int level = 0; level < kLevels; ++level) {
      const int step = 1 << (kLevels - level);
      for (int i = 0; i < kEntries; ++i) {
        edges_[level][i] = positive[i % (1 << level) * step + step / 2 - 1];
      }
    }
  }

  template <int Count>
  static F lookup(const float* table, I index) {
    if constexpr (Count == 1) return load(table);
    if constexpr (Count <= kWidth) return permute(load(table), index);
#if defined(__AVX512F__)
    if constexpr (Count == 32) return permute(load(table), load(table + 16), index);
    return permute(load(table), load(table + 16), load(table + 32), load(table + 48), index);
#endif
  }

  float edges_[kLevels][kEntries];  ///< what halves the boundaries left, by the count so far
};
#endif

/// The first count of 32 codes, a multiple of 8, as a stream of Bits bits each.
template <int Bits>
inline void pack_some(Bytes x, int64_t count, uint8_t* out) {
  if (count >= kSlab) return pack<Bits>(x, out);
  uint8_t q[kSlab];
  pack<8>(x, q);
  for (int64_t i = 0; i < count; i += 8, out += Bits) pack8<Bits>(q + i, out);
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
  const CodeSearch<Bits>& search = CodeSearch<Bits>::get();
  for (int r = 0; r < batch.rows; ++r) {
    batch.ask_next(r);
    uint8_t* codes = batch.bytes(r);
    if (norm[r] != norm[r]) {
      std::memset(codes, 0, n * Bits / 8);
      continue;
    }
    const float* y = batch.y + r * n;
    const F divisor = splat(norm[r] == 0 ? 1.0f : norm[r]);
    const bool unbiased = encoder == KVQ_ENCODER_UNBIASED;
    uint8_t q[kMaxHeadDim + kBatchPadding];
    for (int64_t i = 0; i < n; i += kAtOnce * kWidth) {
      F z[kAtOnce];
      I code[kAtOnce];
      unroll<kAtOnce>([&](auto j) KVQ_INLINE { z[j] = load(y + i + j * kWidth) / divisor; });
      search.find(z, code);
      unroll<kAtOnce * kWidth / kSlab>([&](auto slab) KVQ_INLINE {
        const int64_t first = i + slab * kSlab;
        const Bytes x = narrow(code + slab * (kSlab / kWidth));
        pack_some<Bits>(x, n - first, codes + first * Bits / 8);
        if (unbiased) pack<8>(x, q + first);
      });
    }
    if (unbiased) {
      float centroid[kMaxHeadDim];
      for (int64_t i = 0; i < n; ++i) centroid[i] = kvq_codebook(Bits)[q[i]];
      const float dot = dot32(y, centroid, n);
      if (dot > 0) store_scale(batch.scales[r], 0, dtype, squares[r] / dot);
    }
  }
}

}  // namespace kvq::cpu::KVQ_ISA
