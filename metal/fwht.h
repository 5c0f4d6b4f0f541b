// The block Walsh-Hadamard transform of vectors in a simdgroup, in the order of
// reference.hadamard.
#pragma once

#include "common.h"

/// Multiplies the vectors in the lanes' registers (see Place) by the orthonormal block Hadamard
/// matrix; norm is 1 / sqrt(block).
inline void fwht_lanes(thread float* x, thread const Place& at, int block, float norm) {
  KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
    if (256 * pass >= at.dim) continue;
    thread float* v = x + 8 * pass;
    KVQ_UNROLL for (int step = 1; step < 8; step *= 2) {
      if (step >= block) continue;
      KVQ_UNROLL for (int i = 0; i < 8; ++i) {
        if ((i & step) != 0) continue;
        const float a = v[i], b = v[i + step];
        v[i] = a + b;
        v[i + step] = a - b;
      }
    }
    KVQ_UNROLL for (int step = 1; step < 32; step *= 2) {
      if (8 * step >= block) continue;
      const float sign = (at.lane & uint(step)) != 0u ? -1.0f : 1.0f;
      KVQ_UNROLL for (int i = 0; i < 8; ++i) {
        v[i] = fma(v[i], sign, simd_shuffle_xor(v[i], ushort(step)));
      }
    }
  }
  KVQ_UNROLL for (int step = 1; step < KVQ_PASSES; step *= 2) {
    if (256 * step >= block) continue;
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      if ((pass & step) != 0 || 256 * pass >= at.dim) continue;
      KVQ_UNROLL for (int i = 8 * pass; i < 8 * pass + 8; ++i) {
        const float a = x[i], b = x[i + 8 * step];
        x[i] = a + b;
        x[i + 8 * step] = a - b;
      }
    }
  }
  KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
    if (256 * pass >= at.dim) continue;
    KVQ_UNROLL for (int i = 8 * pass; i < 8 * pass + 8; ++i) x[i] *= norm;
  }
}

/// Multiplies one vector by the same matrix. Lane j holds elements j, j + 32, ... of the row and
/// touches no others.
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
