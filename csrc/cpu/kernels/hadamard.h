// Sign flips and the block Walsh-Hadamard transform of one vector. Butterflies run in the order
// reference.hadamard states, so results are the same to the last bit.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace kvq::cpu::KVQ_ISA {

/// One butterfly stage inside a vector: lanes i and i ^ Half become their sum and difference.
template <int Half>
inline F butterfly(F x) {
  alignas(64) static constexpr auto kSigns = [] {
    std::array<float, kWidth> signs{};
    for (int i = 0; i < kWidth; ++i) signs[i] = i & Half ? -1.0f : 1.0f;
    return signs;
  }();
  return fma(x, load(kSigns.data()), swap<Half>(x));  // x * -1 is exact: this is a - b
}

/// The stages from half = first up to block / 2.
inline void butterflies(float* y, int64_t size, int64_t first, int64_t block) {
  for (int64_t half = first; half < block; half *= 2) {
    for (int64_t base = 0; base < size; base += 2 * half) {
      float* a = y + base;
      float* b = a + half;
      for (int64_t i = 0; i < half; ++i) {
        const float sum = a[i] + b[i], difference = a[i] - b[i];
        a[i] = sum;
        b[i] = difference;
      }
    }
  }
}

/// The stages within Vectors vectors, in registers.
template <int Vectors>
void butterflies(float* y, int64_t size) {
  for (const float* end = y + size; y < end; y += Vectors * kWidth) {
    F x[Vectors];
    unroll<Vectors>([&](auto v) KVQ_INLINE {
      x[v] = butterfly<1>(load(y + v * kWidth));
      x[v] = butterfly<2>(x[v]);
      if constexpr (kWidth > 4) x[v] = butterfly<4>(x[v]);
      if constexpr (kWidth > 8) x[v] = butterfly<8>(x[v]);
    });
    unroll<3>([&](auto stage) KVQ_INLINE {
      constexpr int kHalf = 1 << stage;
      if constexpr (kHalf < Vectors) {
        unroll<Vectors>([&](auto v) KVQ_INLINE {
          if constexpr ((v & kHalf) == 0) {
            const F sum = x[v] + x[v + kHalf], difference = x[v] - x[v + kHalf];
            x[v] = sum;
            x[v + kHalf] = difference;
          }
        });
      }
    });
    unroll<Vectors>([&](auto v) KVQ_INLINE { store(y + v * kWidth, x[v]); });
  }
}

inline void multiply(float* y, const float* x, int64_t size) {
  for (int64_t i = 0; i < size; ++i) y[i] *= x[i];
}

inline void hadamard_row(float* y, int64_t size, const float* signs, bool inverse) {
  const int64_t block = size & -size, vectors = std::min<int64_t>(block / kWidth, 8);
  if (signs && !inverse) multiply(y, signs, size);
  switch (vectors) {
    case 0:
      break;
    case 1:
      butterflies<1>(y, size);
      break;
    case 2:
      butterflies<2>(y, size);
      break;
    case 4:
      butterflies<4>(y, size);
      break;
    default:
      butterflies<8>(y, size);
  }
  butterflies(y, size, vectors ? vectors * kWidth : 1, block);
  const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  for (int64_t i = 0; i < size; ++i) y[i] *= norm;
  if (signs && inverse) multiply(y, signs, size);
}

}  // namespace kvq::cpu::KVQ_ISA
