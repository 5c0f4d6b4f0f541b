// The block Walsh-Hadamard transform of one vector in a simdgroup, in the order of
// reference.hadamard. Lane j holds elements j, j + 32, ... of the row and touches no others.
#pragma once

#include "common.h"

/// Multiplies row by the orthonormal block Hadamard matrix; norm is 1 / sqrt(block).
inline void fwht(threadgroup float* row, uint lane, int n, int block, float norm) {
  // Distances below 32: between lanes.
  for (int base = 0; base < n; base += 32) {
    const int i = base + int(lane);
    float v = i < n ? row[i] : 0.0f;
    for (ushort distance = 1; distance < 32 && int(distance) < block; distance *= 2) {
      const float other = simd_shuffle_xor(v, distance);
      v = (lane & distance) != 0 ? other - v : v + other;
    }
    if (i < n) {
      row[i] = v;
    }
  }
  // From 32 on both elements belong to the same lane.
  for (int distance = 32; distance < block; distance *= 2) {
    for (int base = 0; base < n; base += 2 * distance) {
      for (int i = base + int(lane); i < base + distance; i += 32) {
        const float a = row[i], b = row[i + distance];
        row[i] = a + b;
        row[i + distance] = a - b;
      }
    }
  }
  for (int i = int(lane); i < n; i += 32) {
    row[i] *= norm;
  }
}
