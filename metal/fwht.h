// The block Walsh-Hadamard transform of vectors in a simdgroup, in the order of
// reference.hadamard.
#pragma once

#include "common.h"

/// A stage between elements of one lane, `step` registers apart.
inline void add_pairs(thread float* v, int step) {
  KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
    if ((i & step) != 0) continue;
    const float a = v[i], b = v[i + step];
    v[i] = a + b;
    v[i + step] = a - b;
  }
}

/// A stage between lanes.
inline void add_lanes(thread float* v, thread const Place& at, int step) {
  const float sign = (at.lane & uint(step)) != 0u ? -1.0f : 1.0f;
  KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
    v[i] = fma(v[i], sign, simd_shuffle_xor(v[i], ushort(step)));
  }
}

/// All stages, without the factor.
inline void add_and_subtract(thread float* x, thread const Place& at) {
  const int block = at.dim & -at.dim;
  KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
    if (KVQ_SPAN * pass >= at.dim) continue;
    thread float* v = x + KVQ_WIDTH * pass;
    KVQ_UNROLL for (int step = 1; step < 8; step *= 2) {
      if (step < block) add_pairs(v, step);
    }
    if (block > 8) add_lanes(v, at, 1);
    if (block > 16) add_pairs(v, 8);
    KVQ_UNROLL for (int step = 2; step < 32; step *= 2) {
      if (block > KVQ_WIDTH * step) add_lanes(v, at, step);
    }
  }
  if (block > KVQ_SPAN) {
    KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) {
      const float a = x[i], b = x[i + KVQ_WIDTH];
      x[i] = a + b;
      x[i + KVQ_WIDTH] = a - b;
    }
  }
}

/// Multiplies the vectors in the lanes' registers (see Place) by the orthonormal block Hadamard
/// matrix; norm is 1 / sqrt(block), the largest power of two that divides D.
inline void fwht_lanes(thread float* x, thread const Place& at, float norm) {
  add_and_subtract(x, at);
  KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
    if (KVQ_SPAN * pass >= at.dim) continue;
    KVQ_UNROLL for (int i = 0; i < KVQ_WIDTH; ++i) x[KVQ_WIDTH * pass + i] *= norm;
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
