// TurboQuant: a rotated vector as Lloyd-Max codes and one norm (reference._encode_turboquant).
#pragma once

#include <cmath>
#include <cstdint>

#include "../../shared/codebooks.h"
#include "convert.h"
#include "lanes.h"

namespace kvq::cpu::KVQ_ISA {

constexpr int64_t kMaxHeadDim = 1024;

inline const float* codebook(int bits) {
  switch (bits) {
    case 2:
      return kvq_codebook_2;
    case 3:
      return kvq_codebook_3;
    case 4:
      return kvq_codebook_4;
    case 5:
      return kvq_codebook_5;
    case 6:
      return kvq_codebook_6;
    default:
      return kvq_codebook_8;
  }
}

inline const float* boundaries(int bits) {
  switch (bits) {
    case 2:
      return kvq_boundaries_2;
    case 3:
      return kvq_boundaries_3;
    case 4:
      return kvq_boundaries_4;
    case 5:
      return kvq_boundaries_5;
    case 6:
      return kvq_boundaries_6;
    default:
      return kvq_boundaries_8;
  }
}

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

/// Finds a code in two steps: a cell of a fine uniform grid gives a code at most two too small,
/// and comparing with the exact boundaries gives the rest.
template <int Bits>
struct CodeSearch {
  static constexpr int kCells = 1024;  // narrower than the closest two boundaries at 8 bits
  static constexpr float kReach = 5.0f;
  uint8_t first[kCells];
  float edge[(1 << Bits) + 1];  // the boundaries, then infinity

  CodeSearch() {
    const float* inner = boundaries(Bits);
    for (int i = 0; i < (1 << Bits) - 1; ++i) edge[i] = inner[i];
    edge[(1 << Bits) - 1] = edge[1 << Bits] = INFINITY;
    for (int cell = 0; cell < kCells; ++cell) {
      // The cell before: rounding of the index must not skip a boundary.
      const float left = cell == 0 ? -INFINITY : (cell - 1) * (2 * kReach / kCells) - kReach;
      int code = 0;
      while (edge[code] < left) ++code;
      first[cell] = static_cast<uint8_t>(code);
    }
  }

  static const CodeSearch& get() {
    static const CodeSearch search;
    return search;
  }

  /// q[i]: how many boundaries lie below y[i] / divisor.
  void find(const float* y, float divisor, int64_t n, uint8_t* q) const {
    for (int64_t i = 0; i < n; i += 8) {
      float z[8];
      int cell[8];
      for (int j = 0; j < 8; ++j) {
        z[j] = y[i + j] / divisor;
        const float at = (z[j] + kReach) * (kCells / (2 * kReach));
        cell[j] = static_cast<int>(at < 0 ? 0.0f : at > kCells - 1 ? kCells - 1.0f : at);
      }
      for (int j = 0; j < 8; ++j) {
        int code = first[cell[j]];
        for (int step = 0; step < 3; ++step) code += z[j] > edge[code];
        q[i + j] = static_cast<uint8_t>(code);
      }
    }
  }
};

/// Dense LSB-first packing of 8 codes into Bits bytes.
template <int Bits>
inline void pack8(const uint8_t* q, uint8_t* out) {
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) word |= static_cast<uint64_t>(q[i]) << (i * Bits);
  for (int i = 0; i < Bits; ++i) out[i] = static_cast<uint8_t>(word >> (8 * i));
}

template <int Bits>
inline void unpack8(const uint8_t* in, uint8_t* q) {
  uint64_t word = 0;
  for (int i = 0; i < Bits; ++i) word |= static_cast<uint64_t>(in[i]) << (8 * i);
  for (int i = 0; i < 8; ++i) q[i] = static_cast<uint8_t>(word >> (i * Bits)) & ((1 << Bits) - 1);
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
  uint8_t q[kMaxHeadDim];
  CodeSearch<Bits>::get().find(y, divisor, n, q);
  for (int64_t i = 0; i < n; i += 8) pack8<Bits>(q + i, codes + i * Bits / 8);
  if (encoder == KVQ_ENCODER_UNBIASED) {
    float centroid[kMaxHeadDim];
    for (int64_t i = 0; i < n; ++i) centroid[i] = codebook(Bits)[q[i]];
    const float dot = dot32(y, centroid, n);
    if (dot > 0) store_scale(scales, 0, layout.scale_dtype, squares / dot);
  }
}

template <int Bits>
void decode_turboquant(const uint8_t* codes, const char* scales, const Layout& layout, float* y) {
  const float norm = load_scale(scales, 0, layout.scale_dtype);
  const float* table = codebook(Bits);
  for (int64_t i = 0; i < layout.head_dim; i += 8) {
    uint8_t q[8];
    unpack8<Bits>(codes + i * Bits / 8, q);
    for (int j = 0; j < 8; ++j) y[i + j] = table[q[j]] * norm;
  }
}

}  // namespace kvq::cpu::KVQ_ISA
