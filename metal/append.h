// kvq_append_*: K and V of a step in one dispatch. One simdgroup per vector; grid: 32 lanes,
// L tokens, 2 * B * heads rows, K's first. Pairs of formats are too many to name: both formats
// are function constants, so a pipeline holds the code of its pair only.
#pragma once

#include "affine.h"
#include "dense.h"
#include "fp8.h"
#include "gguf.h"
#include "rows.h"
#include "turboquant.h"

constant int kvq_k_family [[function_constant(0)]];
constant int kvq_k_bits [[function_constant(1)]];
constant int kvq_k_group [[function_constant(2)]];
constant bool kvq_k_rotate [[function_constant(3)]];
constant bool kvq_k_centre [[function_constant(4)]];
constant int kvq_v_family [[function_constant(5)]];
constant int kvq_v_bits [[function_constant(6)]];
constant int kvq_v_group [[function_constant(7)]];
constant bool kvq_v_rotate [[function_constant(8)]];
constant bool kvq_v_centre [[function_constant(9)]];

inline void encode_as(int family, threadgroup float* row, uint lane, int n,
                      thread const Target& out, int bits, int group) {
  switch (family) {
    case KVQ_FAMILY_AFFINE:
      Affine::encode(row, lane, n, out, bits, group);
      break;
    case KVQ_FAMILY_FP8_E4M3:
      Fp8E4M3::encode(row, lane, n, out, bits, group);
      break;
    case KVQ_FAMILY_FP8_E5M2:
      Fp8E5M2::encode(row, lane, n, out, bits, group);
      break;
    case KVQ_FAMILY_Q8_0:
      Q8_0::encode(row, lane, n, out, bits, group);
      break;
    case KVQ_FAMILY_Q4_0:
      Q4_0::encode(row, lane, n, out, bits, group);
      break;
    case KVQ_FAMILY_TURBOQUANT:
      TurboQuant::encode(row, lane, n, out, bits, group);
      break;
    default:
      Dense::encode(row, lane, n, out, bits, group);
      break;
  }
}

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
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const int g = int(at.z) % params.heads, b = int(at.z) / params.heads % params.batch;
  const bool is_v = int(at.z) / params.heads >= params.batch;
  const int t = int(at.y);
  constant KvqWriteSide& side = params.side[is_v ? 1 : 0];
  const int64_t slot = slot_of(params, position, b, t, side.capacity);
  if (slot >= 0 && g < side.heads) {
    const int family = is_v ? kvq_v_family : kvq_k_family;
    const int bits = is_v ? kvq_v_bits : kvq_k_bits;
    const int group = is_v ? kvq_v_group : kvq_k_group;
    const bool rotate = is_v ? kvq_v_rotate : kvq_k_rotate;
    const bool centre = is_v ? kvq_v_centre : kvq_k_centre;
    threadgroup float* row = rows + int(simdgroup) * params.row;
    load_row((is_v ? v : k) + (b * side.x.batch + g * side.x.head + t * side.x.token),
             is_v ? v_signs : k_signs, (is_v ? v_mean : k_mean) + g * side.head_dim, side, row,
             lane, rotate || family == KVQ_FAMILY_TURBOQUANT, rotate, centre);
    const Target out =
        target_of(is_v ? v_codes : k_codes, is_v ? v_scales : k_scales, is_v ? v_biases : k_biases,
                  side, b, g, slot, family == KVQ_FAMILY_NONE, rotate);
    encode_as(family, row, lane, side.head_dim, out, bits, group);
  }
}
