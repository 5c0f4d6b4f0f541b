// The block Walsh-Hadamard transform of one vector in a simdgroup, in the order of
// reference.hadamard: distances below 32 between lanes, the others within a lane.
#pragma once

#include "common.h"

/// Stages at distances below 32. v is the lane's element of 32 consecutive ones.
inline float fwht_lanes(float v, uint lane, int block) {
  for (ushort distance = 1; distance < 32 && int(distance) < block; distance *= 2) {
    const float other = simd_shuffle_xor(v, distance);
    v = (lane & distance) != 0 ? other - v : v + other;
  }
  return v;
}

/// Stages at distances from 32 on, where both elements belong to the same lane.
inline void fwht_row(threadgroup float* row, uint lane, int n, int block) {
  for (int distance = 32; distance < block; distance *= 2) {
    for (int base = 0; base < n; base += 2 * distance) {
      for (int i = base + int(lane); i < base + distance; i += 32) {
        const float a = row[i], b = row[i + distance];
        row[i] = a + b;
        row[i + distance] = a - b;
      }
    }
  }
}
