// kvq_dequantize_*: slots [start, start + tokens) to dense [B, G, tokens, D]. One simdgroup per
// vector; grid: 32 lanes, tokens, B * G rows.
#pragma once

#include "quantize.h"

template <typename T, typename Codec, int Family, int Bits, int Group>
[[kernel]] void kvq_dequantize(
    const device uchar* codes [[buffer(0)]], const device uchar* scales [[buffer(1)]],
    const device uchar* biases [[buffer(2)]], const device float* signs [[buffer(3)]],
    const device float* mean [[buffer(4)]], device T* out [[buffer(5)]],
    constant KvqReadParams& params [[buffer(6)]], threadgroup float* rows [[threadgroup(0)]],
    uint3 at [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constexpr int kWidth = Family == KVQ_FAMILY_NONE ? 1 : 4;  // elements a lane decodes together
  const int b = int(at.z) / params.heads, g = int(at.z) % params.heads, n = params.head_dim;
  const int64_t slot = params.start + int64_t(at.y);
  const int64_t scale_size = params.scale_dtype == KVQ_FLOAT32 ? 4 : 2;
  const int64_t code_size =
      Family != KVQ_FAMILY_NONE ? 1 : (params.codes_dtype == KVQ_FLOAT32 ? 4 : 2);
  Source in;
  in.codes = codes + code_size * (b * params.codes.batch + g * params.codes.head +
                                  slot * params.codes.token);
  in.scales = scales + scale_size * (b * params.scales.batch + g * params.scales.head +
                                     slot * params.scales.token);
  in.biases = biases + scale_size * (b * params.biases.batch + g * params.biases.head +
                                     slot * params.biases.token);
  in.scale_dtype = params.scale_dtype;
  in.codes_dtype = params.codes_dtype;
  device T* y = out + (int64_t(at.z) * params.tokens + int64_t(at.y)) * n;
  threadgroup float* row = rows + int(simdgroup) * n;
  for (int i = int(lane) * kWidth; i < n; i += 32 * kWidth) {
    float v[kWidth];
    Codec::decode(in, i, Bits, Group, v);
    for (int j = 0; j < kWidth; ++j) {
      if (kvq_rotate) {
        row[i + j] = v[j];
      } else if (kvq_centre) {
        y[i + j] = to_dtype<T>(v[j] + mean[g * n + i + j]);
      } else {
        y[i + j] = Family == KVQ_FAMILY_NONE ? T(v[j]) : to_dtype<T>(v[j]);
      }
    }
  }
  if (kvq_rotate) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    fwht(row, lane, n, params.block, params.norm);
    for (int i = int(lane); i < n; i += 32) {
      float v = row[i] * signs[i];
      if (kvq_centre) {
        v += mean[g * n + i];
      }
      y[i] = to_dtype<T>(v);
    }
  }
}
