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

inline void encode_as(int family, thread float* x, thread const Place& at, thread const Target& out,
                      int bits, int group, threadgroup float* row) {
  switch (family) {
    case KVQ_FAMILY_AFFINE:
      Affine::encode(x, at, out, bits, group, row);
      break;
    case KVQ_FAMILY_FP8_E4M3:
      Fp8E4M3::encode(x, at, out, bits, group, row);
      break;
    case KVQ_FAMILY_FP8_E5M2:
      Fp8E5M2::encode(x, at, out, bits, group, row);
      break;
    case KVQ_FAMILY_Q8_0:
      Q8_0::encode(x, at, out, bits, group, row);
      break;
    case KVQ_FAMILY_Q4_0:
      Q4_0::encode(x, at, out, bits, group, row);
      break;
    default:
      TurboQuant::encode(x, at, out, bits, group, row);
      break;
  }
}

/// Vectors of one side that a simdgroup takes.
inline int side_vectors(int family, int dim) {
  return family == KVQ_FAMILY_NONE ? 1 : vectors_per_simdgroup(dim);
}

/// Packs one side's tokens of simdgroup number `simdgroup` of the head.
template <typename T>
inline void append_side(const device T* x, device uchar* codes, device uchar* scales,
                        device uchar* biases, const device float* signs, const device float* mean,
                        const device int* position, constant KvqWriteParams& params,
                        constant KvqWriteSide& side, threadgroup float* row, int b, int g,
                        int simdgroup, uint lane, int family, int bits, int group, bool rotate,
                        bool centre, int dim, bool wide, int scale_dtype) {
  const bool dense = family == KVQ_FAMILY_NONE;
  const int vectors = side_vectors(family, dim);
  const Slots slots = slots_of(params, position, b, side.capacity);
  const Target head = target_of(codes, scales, biases, side, b, g, scale_dtype, dense, rotate);
  Place place = place_of(dense ? 256 : dim, lane, wide);
  if (family == KVQ_FAMILY_TURBOQUANT) place.table = TurboQuant::encoder_entry(lane, bits);
  const bool exists = g < side.heads && (dense || place.vector < vectors);
  const int steps = steps_of(kvq_k_family, steps_of(kvq_v_family, params.steps));
  const int t = simdgroup * steps * vectors + (dense ? 0 : place.vector);
  const device T* from = x + (b * side.x.batch + g * side.x.head + t * side.x.token);
  Cursor cursor = cursor_at(head, slots, side, t, dense);
  place.active = exists && cursor.writes(slots);
  Loaded next;
  if (!dense) next = load_lanes(from, place);
  KVQ_ROLLED for (int step = 1;; ++step) {
    const Place here = place;
    const Target out = cursor.target;
    const device T* row_of_x = from;
    const Loaded loaded = next;
    // The next vectors are on their way while these are encoded.
    if (step < steps) {
      advance(cursor, slots, side, vectors, dense);
      from += vectors * side.x.token;
      place.active = exists && cursor.writes(slots);
      if (!dense) next = load_lanes(from, place);
    }
    if (dense) {
      if (here.active) {
        copy_row(row_of_x, signs, mean + g * dim, side, row, lane, rotate, centre, out);
      }
    } else {
      float v[KVQ_VALUES];
      prepare_lanes<T>(loaded, signs, mean + g * dim, here, side.norm,
                       rotate || family == KVQ_FAMILY_TURBOQUANT, rotate, centre, v);
      encode_as(family, v, here, out, bits, group, row);
    }
    if (step >= steps) break;
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
    uint3 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const bool is_v = int(group.z) >= params.batch;
  const int g = int(group.y), b = int(group.z) - (is_v ? params.batch : 0);
  threadgroup float* row = rows + int(simdgroup) * params.row;
  if (is_v) {
    append_side(v, v_codes, v_scales, v_biases, v_signs, v_mean, position, params, params.side[1],
                row, b, g, simdgroup_in_row(at), lane, kvq_v_family, kvq_v_bits, kvq_v_group,
                kvq_v_rotate, kvq_v_centre, kvq_v_head_dim, kvq_v_wide, kvq_v_scale_dtype);
  } else {
    append_side(k, k_codes, k_scales, k_biases, k_signs, k_mean, position, params, params.side[0],
                row, b, g, simdgroup_in_row(at), lane, kvq_k_family, kvq_k_bits, kvq_k_group,
                kvq_k_rotate, kvq_k_centre, kvq_k_head_dim, kvq_k_wide, kvq_k_scale_dtype);
  }
}
