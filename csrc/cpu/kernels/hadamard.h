// Sign flips and the block Walsh-Hadamard transform of one vector. Butterflies run in the order
// reference.hadamard states, so results are the same to the last bit.
#pragma once

#include <cmath>
#include <cstdint>

namespace kvq::cpu::KVQ_ISA {

inline void hadamard_row(float* y, int64_t size, const float* signs, bool inverse) {
  const int64_t block = size & -size;
  if (signs && !inverse) {
    for (int64_t i = 0; i < size; ++i) y[i] *= signs[i];
  }
  for (int64_t half = 1; half < block; half *= 2) {
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
  const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  for (int64_t i = 0; i < size; ++i) y[i] *= norm;
  if (signs && inverse) {
    for (int64_t i = 0; i < size; ++i) y[i] *= signs[i];
  }
}

}  // namespace kvq::cpu::KVQ_ISA
