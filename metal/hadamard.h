// kvq_hadamard_*: sign flips and the block Walsh-Hadamard transform of contiguous vectors. A
// simdgroup takes as many as its lanes hold, or one of any length; grid: simdgroups.
#pragma once

#include "rows.h"

constant bool kvq_signs [[function_constant(0)]];
constant bool kvq_inverse [[function_constant(1)]];
constant int kvq_head_dim [[function_constant(2)]];
constant bool kvq_wide [[function_constant(3)]];

inline void multiply_lanes(thread float* v, const device float* signs, thread const Place& at) {
  KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
    KVQ_UNROLL for (int eight = 0; eight < KVQ_WIDTH; eight += 8) {
      if (KVQ_SPAN * pass >= at.dim || !at.holds(pass, eight)) continue;
      float other[8];
      load8(signs + at.element(pass, eight), true, other);
      KVQ_UNROLL for (int i = 0; i < 8; ++i) v[KVQ_WIDTH * pass + eight + i] *= other[i];
    }
  }
}

template <typename T>
[[kernel]] void kvq_hadamard(const device T* x [[buffer(0)]],
                             const device float* signs [[buffer(1)]], device T* out [[buffer(2)]],
                             constant KvqHadamardParams& params [[buffer(3)]],
                             threadgroup float* rows [[threadgroup(0)]],
                             uint3 at [[thread_position_in_grid]],
                             uint lane [[thread_index_in_simdgroup]],
                             uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const bool before = kvq_signs && !kvq_inverse, after = kvq_signs && kvq_inverse;
  if (kvq_wide) {
    Place place = place_of(kvq_head_dim, lane, true);
    const int64_t number =
        int64_t(simdgroup_in_row(at)) * vectors_per_simdgroup(kvq_head_dim) + place.vector;
    place.active = place.exists && number < params.vectors;
    const Loaded loaded = load_lanes(x + kvq_head_dim * number, place);
    float v[KVQ_VALUES];
    KVQ_UNROLL for (int i = 0; i < KVQ_VALUES; ++i) {
      if (KVQ_SPAN * (i / KVQ_WIDTH) < kvq_head_dim) {
        v[i] = value_at<T>(loaded.words + i / 8 * 8, i % 8);
      }
    }
    if (before) multiply_lanes(v, signs, place);
    fwht_lanes(v, place, params.norm);
    if (after) multiply_lanes(v, signs, place);
    KVQ_UNROLL for (int pass = 0; pass < KVQ_PASSES; ++pass) {
      KVQ_UNROLL for (int eight = 0; eight < KVQ_WIDTH; eight += 8) {
        if (KVQ_SPAN * pass >= kvq_head_dim || !place.holds(pass, eight)) continue;
        store8(out + kvq_head_dim * number + place.element(pass, eight), true,
               v + KVQ_WIDTH * pass + eight);
      }
    }
    return;
  }
  const int n = params.head_dim;
  const int64_t first = int64_t(simdgroup_in_row(at)) * n;
  threadgroup float* row = rows + int(simdgroup) * n;
  for (int i = int(lane); i < n; i += 32) {
    const float v = float(x[first + i]);
    row[i] = before ? v * signs[i] : v;
  }
  fwht(row, lane, n, params.block, params.norm);
  for (int i = int(lane); i < n; i += 32) {
    out[first + i] = to_dtype<T>(after ? row[i] * signs[i] : row[i]);
  }
}
