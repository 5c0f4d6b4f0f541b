// Sign flips and the block Walsh-Hadamard transform of one vector. Butterflies run in the order
// reference.hadamard states, so results are the same to the last bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace kvq::cpu::KVQ_ISA {

/// One butterfly stage inside a vector: lanes i and i ^ Half become their sum and difference.
template <int Half>
inline Lanes butterfly(Lanes x) {
  Lanes sign;
  for (int i = 0; i < kLanes; ++i) sign[i] = i & Half ? -1.0f : 1.0f;
  return swap_lanes<Half>(x) + x * sign;  // x * -1 is exact: this is a - b
}

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

inline void multiply(float* y, const float* x, int64_t size) {
  for (int64_t i = 0; i < size; ++i) y[i] *= x[i];
}

inline void hadamard_row(float* y, int64_t size, const float* signs, bool inverse) {
  const int64_t block = size & -size;
  if (signs && !inverse) multiply(y, signs, size);
  if (block < kLanes) {
    butterflies(y, size, 1, block);
  } else {
    for (int64_t i = 0; i < size; i += kLanes) {
      Lanes x = load_lanes(y + i);
      x = butterfly<1>(x);
      x = butterfly<2>(x);
      x = butterfly<4>(x);
      store_lanes(y + i, butterfly<8>(x));
    }
    butterflies(y, size, kLanes, block);
  }
  const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  for (int64_t i = 0; i < size; ++i) y[i] *= norm;
  if (signs && inverse) multiply(y, signs, size);
}

}  // namespace kvq::cpu::KVQ_ISA
