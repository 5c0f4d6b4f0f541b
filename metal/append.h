// kvq_append_*: K and V of a step in one dispatch. A simdgroup takes neighbouring tokens; grid: as
// many simdgroups as the side with fewer tokens each needs, heads, 2 * B, K's first. Pairs of
// formats are too many to name: both formats are function constants, so a pipeline holds the code
// of its pair only.
#pragma once

#include "affine.h"
#include "fp8.h"
#include "gguf.h"
#include "rows.h"
#include "turboquant.h"

constant int kvq_k_family [[function_constant(0)]];
constant int kvq_k_bits [[function_constant(1)]];
constant int kvq_k_group [[function_constant(2)]];
constant bool kvq_k_rotate [[function_constant(3)]];
constant bool kvq_k_centre [[function_constant(4)]];
constant int kvq_k_head_dim [[function_constant(5)]];
constant bool kvq_k_wide [[function_constant(6)]];
constant int kvq_v_family [[function_constant(7)]];
constant int kvq_v_bits [[function_constant(8)]];
constant int kvq_v_group [[function_constant(9)]];
constant bool kvq_v_rotate [[function_constant(10)]];
constant bool kvq_v_centre [[function_constant(11)]];
constant int kvq_v_head_dim [[function_constant(12)]];
constant bool kvq_v_wide [[function_constant(13)]];
constant int kvq_k_scale_dtype [[function_constant(14)]];
constant int kvq_v_scale_dtype [[function_constant(15)]];

/// The encoder of whichever family a side has.
struct AnyEncoder {
  static uint table_entry(thread const Kind& kind, uint lane) {
    return kind.family == KVQ_FAMILY_TURBOQUANT ? TurboQuant::encoder_entry(lane, kind.bits) : 0u;
  }
  static void encode(thread const Kind& kind, thread float* x, thread const Place& at,
                     thread const Target& out, threadgroup float* row) {
    switch (kind.family) {
      case KVQ_FAMILY_AFFINE:
        Affine::encode(x, at, out, kind.bits, kind.group, row);
        break;
      case KVQ_FAMILY_FP8_E4M3:
        Fp8E4M3::encode(x, at, out, kind.bits, kind.group, row);
        break;
      case KVQ_FAMILY_FP8_E5M2:
        Fp8E5M2::encode(x, at, out, kind.bits, kind.group, row);
        break;
      case KVQ_FAMILY_Q8_0:
        Q8_0::encode(x, at, out, kind.bits, kind.group, row);
        break;
      case KVQ_FAMILY_Q4_0:
        Q4_0::encode(x, at, out, kind.bits, kind.group, row);
        break;
      case KVQ_FAMILY_TURBOQUANT:
        TurboQuant::encode(x, at, out, kind.bits, kind.group, row);
        break;
      default:
        Dense::encode(x, at, out, kind.bits, kind.group, row);
        break;
    }
  }
};

template <typename T>
[[kernel]] void kvq_append(
    const device T* k [[buffer(0)]], device uchar* k_codes [[buffer(1)]],
    device uchar* k_scales [[buffer(2)]], device uchar* k_biases [[buffer(3)]],
    const device float* k_signs [[buffer(4)]], const device float* k_mean [[buffer(5)]],
    const device T* v [[buffer(6)]], device uchar* v_codes [[buffer(7)]],
    device uchar* v_scales [[buffer(8)]], device uchar* v_biases [[buffer(9)]],
    const device float* v_signs [[buffer(10)]], const device float* v_mean [[buffer(11)]],
    const device int* position [[buffer(12)]], constant KvqWriteParams& params [[buffer(13)]],
    threadgroup float* rows [[threadgroup(0)]], uint3 at [[thread_position_in_grid]],
    uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const bool is_v = int(group.z) >= params.batch;
  const int g = int(group.y), b = int(group.z) - (is_v ? params.batch : 0);
  const Kind k_kind = {kvq_k_family,      kvq_k_bits,   kvq_k_group,  kvq_k_head_dim,
                       kvq_k_scale_dtype, kvq_k_rotate, kvq_k_centre, kvq_k_wide};
  const Kind v_kind = {kvq_v_family,      kvq_v_bits,   kvq_v_group,  kvq_v_head_dim,
                       kvq_v_scale_dtype, kvq_v_rotate, kvq_v_centre, kvq_v_wide};
  const int steps = k_kind.any_row() || v_kind.any_row() ? 1 : params.steps;
  threadgroup float* row = rows + int(simdgroup) * params.row;
  if (is_v) {
    write_tokens<T, AnyEncoder>(v, v_codes, v_scales, v_biases, v_signs, v_mean, position, params,
                                params.side[1], row, b, g, simdgroup_in_row(at), lane, steps,
                                v_kind);
  } else {
    write_tokens<T, AnyEncoder>(k, k_codes, k_scales, k_biases, k_signs, k_mean, position, params,
                                params.side[0], row, b, g, simdgroup_in_row(at), lane, steps,
                                k_kind);
  }
}
