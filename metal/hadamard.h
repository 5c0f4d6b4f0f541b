// kvq_hadamard_*: sign flips and the block Walsh-Hadamard transform of contiguous vectors. One
// simdgroup per vector; grid: vectors.
#pragma once

#include "fwht.h"

constant bool kvq_signs [[function_constant(0)]];
constant bool kvq_inverse [[function_constant(1)]];

template <typename T>
[[kernel]] void kvq_hadamard(const device T* x [[buffer(0)]],
                             const device float* signs [[buffer(1)]], device T* out [[buffer(2)]],
                             constant KvqHadamardParams& params [[buffer(3)]],
                             threadgroup float* rows [[threadgroup(0)]],
                             uint3 at [[thread_position_in_grid]],
                             uint lane [[thread_index_in_simdgroup]],
                             uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const int n = params.head_dim;
  const int64_t first = int64_t(simdgroup_in_row(at)) * n;
  threadgroup float* row = rows + int(simdgroup) * n;
  for (int i = int(lane); i < n; i += 32) {
    const float v = float(x[first + i]);
    row[i] = kvq_signs && !kvq_inverse ? v * signs[i] : v;
  }
  fwht(row, lane, n, params.block, params.norm);
  for (int i = int(lane); i < n; i += 32) {
    out[first + i] = to_dtype<T>(kvq_signs && kvq_inverse ? row[i] * signs[i] : row[i]);
  }
}
