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

/// Finds codes by a uniform grid of cells, each with at most one boundary inside.
template <int Bits>
class CodeSearch {
 public:
  static const CodeSearch& get() {
    static const CodeSearch search;
    return search;
  }

  /// q[i]: how many boundaries lie below y[i] / divisor. Up to kWidth - 1 values past n are read
  /// and written.
  void find(const float* y, float divisor, int64_t n, uint8_t* q) const {
    for (int64_t i = 0; i < n; i += kWidth) {
      const F z = load(y + i) / splat(divisor);
      const I cell = cell_of(z);
      const F below = gather(below_, cell), edge = gather(edge_, cell);
      const F code = select_less(edge, z, below + splat(1.0f), below);
      store_codes<8>(q + i, truncate_to_int(code));
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

/// Dense LSB-first packing of 8 codes into Bits bytes.
template <int Bits>
inline void pack8(const uint8_t* q, uint8_t* out) {
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) word |= static_cast<uint64_t>(q[i]) << (i * Bits);
  for (int i = 0; i < Bits; ++i) out[i] = static_cast<uint8_t>(word >> (8 * i));
}

template <int Bits>
void encode_turboquant(const float* y, const Layout& layout, KvqEncoder encoder, uint8_t* codes,
                       char* scales) {
  const int64_t n = layout.head_dim;
  const float squares = dot32(y, y, n);
  const float norm =
      store_scale(scales, 0, layout.scale_dtype, std::sqrt(squares / static_cast<float>(n)));
  if (norm != norm) {
    std::memset(codes, 0, n * Bits / 8);
    return;
  }
  const float divisor = norm == 0 ? 1.0f : norm;
  uint8_t q[kMaxHeadDim + kWidth];
  CodeSearch<Bits>::get().find(y, divisor, n, q);
  for (int64_t i = 0; i < n; i += 8) pack8<Bits>(q + i, codes + i * Bits / 8);
  if (encoder == KVQ_ENCODER_UNBIASED) {
    float centroid[kMaxHeadDim];
    for (int64_t i = 0; i < n; ++i) centroid[i] = kvq_codebook(Bits)[q[i]];
    const float dot = dot32(y, centroid, n);
    if (dot > 0) store_scale(scales, 0, layout.scale_dtype, squares / dot);
  }
}

}  // namespace kvq::cpu::KVQ_ISA
