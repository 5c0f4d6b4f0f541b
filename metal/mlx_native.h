// kvq_mlx_native_dequantize: rows of mlx-native's TurboQuant layout to dense float32
// [B, G, tokens, D]. One simdgroup per vector; grid: tokens, G, B.
#pragma once

#include "fwht.h"

constant bool kvq_signs [[function_constant(0)]];
constant bool kvq_rotate [[function_constant(1)]];

[[kernel]] void kvq_mlx_native_dequantize(
    const device uchar* codes [[buffer(0)]], const device float* norms [[buffer(1)]],
    const device float* codebook [[buffer(2)]], const device float* signs [[buffer(3)]],
    device float* out [[buffer(4)]], constant KvqMlxNativeParams& params [[buffer(5)]],
    threadgroup float* rows [[threadgroup(0)]], uint3 at [[thread_position_in_grid]],
    uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const int b = int(group.z), g = int(group.y), t = simdgroup_in_row(at), n = params.head_dim;
  const int64_t slot = params.start + int64_t(t);
  const device uchar* code =
      codes + (b * params.codes.batch + g * params.codes.head + slot * params.codes.token);
  const device float* norm =
      norms + (b * params.norms.batch + g * params.norms.head + slot * params.norms.token);
  device float* y = out + ((int64_t(b) * params.heads + g) * params.tokens + t) * n;
  threadgroup float* row = rows + int(simdgroup) * n;
  const uint mask = (1u << params.bits) - 1u;
  for (int i = int(lane); i < n; i += 32) {
    const uint index =
        params.bits == 4 ? (uint(code[i / 2]) >> (i % 2 * 4)) & mask : uint(code[i]) & mask;
    // Up to D = 256 the L2 norm is stored; beyond, the RMS of every 256 coordinates.
    const float factor = n > 256 ? norm[i / 256] / params.divisor : norm[0] * params.scale;
    row[i] = codebook[index] * factor;
  }
  if (kvq_rotate) {
    fwht(row, lane, n, params.block, params.norm);
  }
  for (int i = int(lane); i < n; i += 32) {
    y[i] = kvq_rotate && kvq_signs ? row[i] * signs[i] : row[i];
  }
}
